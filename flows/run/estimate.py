"""Preview of a run: all settings, and an estimate of the training's memory and time."""

from __future__ import annotations

from flows.run.folder import Run
from fuselip_core.config import describe_settings
from fuselip_core.files import find_json

GIGABYTE = 1e9


def preview(run: Run) -> str:
    """Markdown: where the run lives, its estimates, and every setting with its value and meaning."""
    lines = [f"- {line}" for line in (f"run folder: `{run.folder}`", *estimates(run))]
    return "\n".join([*lines, "", "```yaml", describe_settings(run.settings), "```", ""])


def estimates(run: Run) -> list[str]:
    """Length, memory and time of the training, as far as they can be known now; one sentence each."""
    settings = run.settings.train
    length = f"{settings.steps} steps" if settings.steps else f"{settings.epochs:g} epochs"
    found = [f"training: {length} of {settings.batch_size} pairs"]
    if run.settings.model.family != "fuselip":
        return [*found, f"memory and time: no estimate for the family {run.settings.model.family}"]
    try:
        return [*found, _memory(run), _time(run)]
    except ImportError:  # as on a machine whose stages run in containers
        return [*found, "memory and time: no estimate without torch, which this machine lacks"]


def _memory(run: Run) -> str:
    from fuselip_core.model.fuselip_config import FuseLIPConfig
    from fuselip_core.training.memory import step_memory

    settings = run.settings.train
    options = run.settings.model
    config = FuseLIPConfig.of_size(options.size, context_length=options.context_length, width=options.width)
    parts = 1 if settings.accumulation == "auto" else settings.accumulation
    # In float32, as on a CPU, unless bfloat16 is asked for: which machine will train is not known here.
    found = step_memory(config, settings, settings.batch_size, parts, "cpu")
    fits = "; train.accumulation=auto divides a step that does not fit" * (settings.accumulation == "auto")
    return (
        f"memory: about {found.total / GIGABYTE:.1f} GB for the training, beside the libraries' own "
        f"({found.state / GIGABYTE:.1f} GB weights and optimizer, {found.kept / GIGABYTE:.1f} GB activations{fits})"
    )


def _time(run: Run) -> str:
    """From the speed of an earlier run of this checkout, scaled by the number of parameters."""
    places = [run.artifacts, run.repository / "artifacts", *sorted((run.repository / "runs").glob("*/artifacts"))]
    for place in places:
        speed = find_json(place / "metrics.json").get("train/pairs_per_second")
        size = find_json(place / "model" / "config.json").get("width")
        if speed and size and run.settings.train.steps:
            break
    else:
        return "time: unknown until a first run has been measured in this checkout"
    from fuselip_core.model.presets import ENCODERS

    measured = next((name for name, encoder in ENCODERS.items() if encoder.width == size), run.settings.model.size)
    speed *= parameters_of(measured) / parameters_of(run.settings.model.size)
    minutes = run.settings.train.steps * run.settings.train.batch_size / speed / 60
    return f"time: about {minutes:.1f} min of training, by the speed of {place} on the machine that trained it"


def parameters_of(size: str) -> int:
    """Number of weights of the joint encoder of that size."""
    from fuselip_core.model.fuselip_config import FuseLIPConfig
    from fuselip_core.training.memory import parameter_count

    return parameter_count(FuseLIPConfig.of_size(size))
