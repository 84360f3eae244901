"""Preview of a run: all settings, and an estimate of the training's memory and time."""

from __future__ import annotations

from flows.run.folder import Run
from fuselip_core.config import describe_settings
from fuselip_core.files import find_json

# Weights, gradients and AdamW's two moments, each as float32.
STATE_BYTES = 16
# What a transformer block keeps of a token for the backward pass, in numbers of its width (Korthikanti et al. 2022,
# arXiv 2205.05198, equation 2, without the attention matrix, which fused attention does not keep).
KEPT_A_TOKEN = 17
TEXT_TOKENS = 36  # of an average caption, as in docs/scaling.md
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

    settings = run.settings.train
    config = FuseLIPConfig.of_size(run.settings.model.size, context_length=run.settings.model.context_length)
    state = STATE_BYTES * parameters_of(run.settings.model.size)
    number_bytes = 2 if settings.precision == "bfloat16" else 4
    tokens = (config.codes_per_image + TEXT_TOKENS) * settings.batch_size // settings.accumulation
    kept = 1 if settings.gradient_checkpointing else KEPT_A_TOKEN
    activations = tokens * config.width * config.layers * kept * number_bytes
    return (
        f"memory: about {(state + activations) / GIGABYTE:.1f} GB for the training, beside the libraries' own "
        f"({state / GIGABYTE:.1f} GB weights and optimizer, {activations / GIGABYTE:.1f} GB activations)"
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
    import torch

    from fuselip_core.model.fuselip import FuseLIPModel
    from fuselip_core.model.fuselip_config import FuseLIPConfig

    with torch.device("meta"):
        return sum(weight.numel() for weight in FuseLIPModel(FuseLIPConfig.of_size(size)).parameters())
