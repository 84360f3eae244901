"""What a study leaves behind: the best settings as a recipe, plots, and a page with both."""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna
import yaml

from flows.run.folder import Run
from flows.run.forms import nested
from fuselip_core.config import SECTIONS, merge, read_corrections
from fuselip_core.files import atomic_folder, write_json
from fuselip_core.html import data_uri, render

TEMPLATE = Path(__file__).with_name("study.html.j2")
PLOTS = {
    "history": ("plot_optimization_history", "Every trial, and the best so far"),
    "importance": ("plot_param_importances", "How much of the spread each field explains"),
    "parallel": ("plot_parallel_coordinate", "Settings of every trial, coloured by its result"),
}


def write_outcome(study: optuna.Study, base: Run, metric: str) -> Path:
    """Writes best.yaml, trials.json, plots and index.html into the base run's artifacts/sweep/; returns that folder."""
    target = base.artifacts / "sweep"
    with atomic_folder(target) as folder:
        (folder / "best.yaml").write_text(_recipe(study, base, metric), encoding="utf-8")
        rows = [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "value": trial.value if trial.state.name == "COMPLETE" else None,
                "settings": trial.user_attrs.get("settings", {}),
                "note": trial.user_attrs.get("note", ""),
            }
            for trial in study.get_trials(deepcopy=False)
        ]
        write_json(folder / "trials.json", {"metric": metric, "trials": rows})
        drawn = [(title, _draw(study, folder / f"{name}.png", plot, metric)) for name, (plot, title) in PLOTS.items()]
        page = render(
            TEMPLATE,
            name=base.name,
            metric=metric,
            rows=rows,
            best=study.best_trial.number,
            plots=[(title, data_uri(path.read_bytes(), "png")) for title, path in drawn if path],
            recipe=(folder / "best.yaml").read_text(encoding="utf-8"),
        )
        (folder / "index.html").write_text(page, encoding="utf-8")
    return target


def _recipe(study: optuna.Study, base: Run, metric: str) -> str:
    """The base run's corrections and the best settings, as a recipe with the run's recipe as its parent."""
    stated = read_corrections(base.folder / "params.yaml")
    # The evaluation split is that of the search, and a recipe is measured on its own.
    best = nested(study.best_trial.user_attrs["settings"])
    values = merge({section: stated[section] for section in SECTIONS if stated.get(section)}, best)
    values.get("evaluate", {}).pop("split", None)
    content = {"parent": base.settings.recipe} | {section: fields for section, fields in values.items() if fields}
    head = f"# Best of {len(study.trials)} trials of the sweep {base.name}: {metric} {study.best_value:.4g}."
    return f"{head}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"


def _draw(study: optuna.Study, path: Path, plot: str, metric: str) -> Path | None:
    """The plot as PNG; None where there are too few trials for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if plot == "plot_param_importances" and len({trial.value for trial in complete}) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = getattr(draw, plot)(study, target_name=metric)
        axes.figure.set_size_inches(9, 5)
        axes.figure.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close(axes.figure)
    return path
