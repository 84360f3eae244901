"""Parts of a report about transformations and about what an adaptation changed, of the model and of its tokenizer."""

from __future__ import annotations

import re

from fuselip_core.evaluation.report.sections import Metrics, has_task, percent, share
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.html import Html, section, table, tag


def transformations_section(result: EvaluationResult) -> list[Html]:
    """Which variant of an image an instruction asks for, by family; nothing where none was asked."""
    metrics = result.metrics
    if not has_task(result, "transformations"):
        return []
    families = [name.split("/")[1] for name in metrics if re.match(r"transformations/.*/accuracy$", name)]
    parts = ("accuracy", "image_only", "text_only")
    rows = [
        (
            family,
            *(share(result, f"transformations/{family}/{part}") for part in parts),
            percent(metrics[f"transformations/{family}/chance"]),
        )
        for family in families
    ]
    explained = tag(
        "p",
        "The query is an image with an instruction, the options are variants of that same image. The controls ask with "
        "either alone.",
    )
    numbers = table(["Family", "Accuracy", "Image only", "Instruction only", "Chance"], rows)
    return [section("transformations", "Transformations", explained, numbers)]


def adaptation_section(metrics: Metrics) -> list[Html]:
    """The checkpoint that training went on from beside its outcome; nothing for a model from scratch."""
    names = sorted(name.removesuffix("/gain") for name in metrics if re.match(r"adaptation/.*/gain$", name))
    if not names:
        return []
    rows = []
    for name in names:
        before, after = metrics[f"{name}/before"], metrics[f"{name}/after"]
        _, data, measure = name.split("/", 2)
        rows.append(
            (data, measure.replace("/", " "), percent(before), percent(after), f"{100 * (after - before):+.1f}")
        )
    explained = tag(
        "p",
        "What the model could do before and after, on this run's split (target) and on general data (retention), where "
        "such are named. Registration can gate on any of these.",
    )
    numbers = table(["Data", "Measure", "Before", "After", "Gain, points"], rows)
    return [section("adaptation", "Before and after", explained, numbers)]


def modality_section(metrics: Metrics) -> list[Html]:
    """How well the image tokenizer keeps each modality, before it was adapted too where it was."""
    place = "codebook/psnr/"
    modalities = sorted(name.removeprefix(place) for name in metrics if name.startswith(place))
    before = "codebook/before/psnr" in metrics
    if not modalities:
        return []
    rows = []
    for title, part in (("all", ""), *((name, f"/{name}") for name in modalities)):
        names = [f"codebook/before/psnr{part}"] * before + [f"codebook/psnr{part}"]
        rows.append((title, *(f"{metrics[name]:.1f} dB" if name in metrics else "" for name in names)))
    heads = ["Modality", *["Peak signal-to-noise ratio before"] * before, "Peak signal-to-noise ratio"]
    explained = tag("p", "Reconstruction of held-out images from their codes, by modality.")
    return [section("modalities", "Image tokenizer by modality", explained, table(heads, rows))]
