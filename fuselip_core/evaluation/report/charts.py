"""Charts of a report as PNG files, drawn without a display."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuselip_core.files import atomic_write

# Distinguishable for colour-blind readers and in greyscale (Okabe and Ito, 2008, darkened for white paper).
ACCENT, SECOND, CONTROL, CHANCE, INK, RULE = "#0b6e99", "#c2571a", "#a9b4bd", "#3d4852", "#1f2933", "#e4e8eb"
LINES = (ACCENT, SECOND, "#6b4c9a", "#2f7d4f", CHANCE, "#b3446c")
DPI = 150

DIRECTIONS = {"image_to_text": "Image → caption", "text_to_image": "Caption → image"}
QUERIES = {
    "fused": "Image + question",
    "question_only": "Question alone",
    "image_only": "Image alone",
    "blank_image": "Blank image",
    "shuffled_image": "Another image",
    "majority": "Most frequent answer",
    "majority_by_question": "Most frequent by question",
}
PARTS = {"accuracy": "All questions", "accuracy_closed": "Closed", "accuracy_open": "Open"}

Metrics = Mapping[str, float]
Intervals = Mapping[str, tuple[float, float]]
History = Sequence[Mapping[str, float]]


def draw_retrieval(path: Path, metrics: Metrics, intervals: Intervals) -> None:
    """Recall at 1, 5 and 10 in both directions with intervals, chance and shuffled pairs."""
    figure, panels = _figure(2, 1, width=9.0, height=3.3, sharey=True)
    ks = (1, 5, 10)
    for panel, (direction, title) in zip(panels, DIRECTIONS.items(), strict=True):
        names = [f"retrieval/{direction}/recall_at_{k}" for k in ks]
        values = [100 * metrics[name] for name in names]
        panel.bar(range(3), values, 0.4, color=ACCENT, label="model", yerr=_errors(names, metrics, intervals), **_BARS)
        shuffled = [f"retrieval_shuffled/{direction}/recall_at_{k}" for k in ks]
        panel.bar(
            [place + 0.35 for place in range(3)],
            [100 * metrics[name] for name in shuffled],
            0.26,
            color=CONTROL,
            label="shuffled pairs",
            yerr=_errors(shuffled, metrics, intervals),
            **_BARS,
        )
        for place, (value, name) in enumerate(zip(values, names, strict=True)):
            chance = 100 * metrics[f"retrieval/{direction}/chance_at_{ks[place]}"]
            panel.hlines(chance, place - 0.24, place + 0.52, color=CHANCE, lw=2, label="chance" if not place else None)
            high = 100 * intervals.get(name, (0, metrics[name]))[1]
            panel.annotate(f"{value:.1f}", (place, max(value, high)), (0, 3), **_LABEL)
        panel.set_xticks([place + 0.14 for place in range(3)], [f"recall at {k}" for k in ks])
        panel.set_title(title, **_TITLE)
    panels[0].set_ylabel("% of queries")
    panels[0].set_ylim(0, panels[0].get_ylim()[1] * 1.08)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def draw_answers(path: Path, metrics: Metrics, intervals: Intervals) -> None:
    """Accuracy of the fused query and every control, for all, closed and open questions."""
    parts = [part for part in PARTS if f"answers/fused/{part}" in metrics]
    queries = [query for query in QUERIES if f"answers/{query}/accuracy" in metrics]
    figure, panels = _figure(len(parts), 1, width=9.0, height=0.9 + 0.36 * len(queries), sharey=True)
    for panel, part in zip(panels, parts, strict=True):
        names = [f"answers/{query}/{part}" for query in queries]
        values = [100 * metrics[name] for name in names]
        colours = [ACCENT if query == "fused" else CONTROL for query in queries]
        panel.barh(range(len(queries)), values, 0.62, color=colours, xerr=_errors(names, metrics, intervals), **_BARS)
        panel.axvline(100 * metrics["answers/chance"], color=CHANCE, lw=1.2, ls=(0, (3, 2)), label="chance")
        for place, (value, name) in enumerate(zip(values, names, strict=True)):
            high = 100 * intervals.get(name, (0, metrics[name]))[1]
            panel.annotate(
                f"{value:.1f}", (max(value, high), place), (4, 0), **(_LABEL | {"ha": "left", "va": "center"})
            )
        panel.set_yticks(range(len(queries)), [QUERIES[query] for query in queries])
        panel.set_title(PARTS[part], **_TITLE)
        panel.set_xlabel("% right")
        panel.set_xlim(0, panel.get_xlim()[1] * 1.12)
        panel.grid(axis="y", visible=False)
        panel.grid(axis="x", visible=True, color=RULE)
    panels[0].invert_yaxis()
    panels[-1].legend(loc="lower right", frameon=False, fontsize=8)
    _save(figure, path)


def draw_training(path: Path, history: History) -> None:
    """Losses, validation, learning rate, gradient norm and speed over the steps."""
    figure, panels = _figure(3, 2, width=10.0, height=5.2)
    curves = {
        "contrastive": "Contrastive loss",
        "masked": "Masked-token loss",
        "valid/": "Validation, %",
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "pairs_per_second": "Pairs per second",
    }
    looks = sorted({name for line in history for name in line if name.startswith("valid/")})
    for number, (panel, (name, title)) in enumerate(zip(panels, curves.items(), strict=True)):
        if name == "valid/":
            for look, colour in zip(looks, LINES, strict=False):
                _curve(panel, history, look, colour, 100)
        else:
            _curve(panel, history, name, ACCENT)
        panel.set_title(title, **_TITLE)
        if number >= 3:
            panel.set_xlabel("step")
        if not panel.lines:
            panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", color=CHANCE)
        elif name in ("lr", "grad_norm", "pairs_per_second", "valid/"):
            panel.set_ylim(bottom=0)
    if looks:
        panels[2].legend([_look_label(look) for look in looks], frameon=False, fontsize=7.5)
    _save(figure, path)


def draw_map(path: Path, images: Any, texts: Any, modalities: Sequence[str]) -> float:
    """Images (I, D) by modality and captions (C, D) on two principal components; returns their explained variance."""
    both = np.concatenate([images, texts])
    centred = both - both.mean(axis=0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ axes[:2].T
    figure, (panel,) = _figure(1, 1, width=8.0, height=5.0)
    panel.scatter(*flat[len(images) :].T, s=9, color=CONTROL, label="captions", linewidths=0)
    common = [name for name, _ in Counter(modalities).most_common(len(LINES))]
    for name, colour in zip(common, LINES, strict=False):
        chosen = flat[: len(images)][[modality == name for modality in modalities[: len(images)]]]
        panel.scatter(*chosen.T, s=16, color=colour, label=name, linewidths=0, alpha=0.85)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.legend(frameon=False, fontsize=8, loc="best")
    _save(figure, path)
    return float((spread[:2] ** 2).sum() / (spread**2).sum())


_TITLE: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "color": INK, "loc": "left"}
_BARS: dict[str, Any] = {"error_kw": {"ecolor": INK, "elinewidth": 1.1, "capsize": 3}}
_LABEL: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8, "color": INK}


def _figure(columns: int, rows: int, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    # Not pyplot, which keeps figures in a global list and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).ravel())
    for panel in panels:
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(CONTROL)
        panel.tick_params(length=0, colors=INK, labelsize=8.5)
        panel.xaxis.label.set_size(8.5)
        panel.yaxis.label.set_size(8.5)
        panel.grid(axis="y", color=RULE)
        panel.set_axisbelow(True)
    return figure, panels


def _errors(names: Sequence[str], metrics: Metrics, intervals: Intervals) -> list[list[float]]:
    """Lengths below and above each value, in percent."""
    bounds = [intervals.get(name, (metrics[name], metrics[name])) for name in names]
    below = [100 * max(0.0, metrics[name] - low) for name, (low, _) in zip(names, bounds, strict=True)]
    above = [100 * max(0.0, high - metrics[name]) for name, (_, high) in zip(names, bounds, strict=True)]
    return [below, above]


def _curve(panel: Any, history: History, name: str, colour: str, scale: float = 1) -> None:
    points = [(line["step"], scale * line[name]) for line in history if name in line]
    if points:
        panel.plot(*zip(*points, strict=True), color=colour, lw=1.5, marker="." if len(points) < 30 else "")


def _look_label(name: str) -> str:
    parts = name.removeprefix("valid/").removeprefix("retrieval/").split("/")
    return ", ".join(DIRECTIONS.get(part, part.replace("_", " ")) for part in parts)


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as partial:
        # Without matplotlib's version, so that equal charts are equal files.
        figure.savefig(partial, format="png", metadata={"Software": None})
