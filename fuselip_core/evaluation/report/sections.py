"""The parts of a report, each from what its stage left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fuselip_core.config import Settings
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.report.charts import (
    DIRECTIONS,
    PARTS,
    QUERIES,
    draw_answers,
    draw_retrieval,
    draw_training,
)
from fuselip_core.evaluation.result import AnswerExample, Candidate, EvaluationResult, RetrievalExample
from fuselip_core.html import Html, chart, facts, join, section, table, tag

Metrics = Mapping[str, float]
Pictures = Mapping[int, Html]


def retrieval_section(folder: Path, result: EvaluationResult, pictures: Pictures) -> list[Html]:
    """Recall in both directions with chart, table and examples; nothing where the split has no captions."""
    metrics = result.metrics
    if not has_task(result, "retrieval"):
        return []
    draw_retrieval(folder / "retrieval.png", metrics, result.intervals)
    rows, ks = [], (1, 5, 10)
    for direction, title in DIRECTIONS.items():
        name = f"retrieval/{direction}"
        shares = [share(result, f"{name}/recall_at_{k}") for k in ks]
        rows.append((title, *shares, *_ranks(metrics, name)))
        rows.append(("chance", *(percent(metrics[f"{name}/chance_at_{k}"]) for k in ks), "", ""))
        shuffled = f"retrieval_shuffled/{direction}"
        shares = [share(result, f"{shuffled}/recall_at_{k}") for k in ks]
        rows.append(("shuffled pairs", *shares, *_ranks(metrics, shuffled)))
    explained = tag(
        "p",
        f"All {metrics['retrieval/pool']:,.0f} captions are candidates, or all "
        f"{metrics['retrieval/pool_images']:,.0f} images in the other direction. Equal captions all count as right, by "
        "chance too. For the shuffled control each query asks with the embedding of another one; where many captions "
        "are equal it can be below chance, since equal wrong captions come all at once. MRR is the mean of 1 / rank.",
    )
    columns = ["", "Recall at 1", "Recall at 5", "Recall at 10", "Median rank", "MRR"]
    numbers = table(columns, rows, main=(0, 3))
    alt = "Recall at 1, 5 and 10 in both directions, with chance and intervals; the table below has the numbers."
    cards = [_retrieval_card(example, pictures) for example in result.retrieval]
    examples = [tag("h3", "Images drawn at random, with their first captions")] if cards else []
    body = [explained, chart(folder / "retrieval.png", alt), numbers, *examples, tag("div", *cards, klass="examples")]
    return [section("retrieval", "Retrieval", *body)]


def _ranks(metrics: Metrics, name: str) -> tuple[str, str]:
    return f"{metrics[f'{name}/median_rank']:g}", f"{metrics[f'{name}/mean_reciprocal_rank']:.3f}"


def _retrieval_card(example: RetrievalExample, pictures: Pictures) -> Html:
    own = "; ".join(example.captions)
    text = [
        tag("p", tag("strong", "Caption: "), own, klass="clip", title=own),
        tag("p", f"A right caption comes on place {example.rank:,}.", klass="soft"),
    ]
    return tag("article", pictures[example.image], tag("div", *text, _candidates(example.top)), klass="example")


def _candidates(candidates: Iterable[Candidate]) -> Html:
    items = []
    for candidate in candidates:
        mark = tag("span", "✓" if candidate.right else "", title="right" if candidate.right else "")
        text = tag("span", candidate.text, klass="clip", title=candidate.text)
        score = tag("span", f"{candidate.score:.3f}", klass="score")
        items.append(tag("li", mark, text, score, klass="right" if candidate.right else "wrong"))
    return tag("ol", *items)


def answer_section(folder: Path, result: EvaluationResult, pictures: Pictures) -> list[Html]:
    """Accuracy beside its controls with chart, table and examples; nothing where the split has no questions."""
    metrics = result.metrics
    if not has_task(result, "answers"):
        return []
    draw_answers(folder / "answers.png", metrics, result.intervals)
    parts = [part for part in PARTS if f"answers/fused/{part}" in metrics]
    rows = [
        (
            label,
            *(share(result, f"answers/{query}/{part}") for part in parts),
            _points(result, f"answers/gain/{query}/accuracy"),
            f"{metrics[rank]:.3f}" if (rank := f"answers/{query}/mean_reciprocal_rank") in metrics else "",
        )
        for query, label in QUERIES.items()
        if f"answers/{query}/accuracy" in metrics
    ]
    rows.append(("chance", *[percent(metrics["answers/chance"])] * len(parts), "", ""))
    explained = tag(
        "p",
        f"Each of {metrics['answers/questions']:,.0f} questions ({metrics['answers/questions_closed']:,.0f} closed, "
        f"{metrics['answers/questions_open']:,.0f} open) is ranked against all {metrics['answers/pool']:,.0f} distinct "
        "answers of the split. Right means that the correct answer comes first. The controls show what can be had "
        "without looking at the image or without reading the question. “Ahead by” compares image and question "
        "together with a control on the same questions, in points: an interval above 0 says that they do better. MRR "
        "is the mean of 1 / rank.",
    )
    alt = "Accuracy of image and question together beside each control; the table below has the numbers."
    cards = [_answer_card(example, pictures) for example in result.answers]
    examples = [tag("h3", "Questions drawn at random, with their first answers")] if cards else []
    columns = ["Query", *(PARTS[part] for part in parts), "Ahead by", "MRR"]
    numbers = table(columns, rows, main=(0,))
    body = [explained, chart(folder / "answers.png", alt), numbers, *examples, tag("div", *cards, klass="examples")]
    return [section("answers", "Answers", *body)]


def _answer_card(example: AnswerExample, pictures: Pictures) -> Html:
    kind = f", {example.answer_type} question" if example.answer_type else ""
    text = [
        tag("p", tag("strong", example.question)),
        tag("p", f"Answer: {example.answer} (place {example.rank:,}{kind})", klass="soft"),
    ]
    return tag("article", pictures[example.image], tag("div", *text, _candidates(example.top)), klass="example")


def candidates_section(result: EvaluationResult) -> list[Html]:
    """Accuracy of every evaluation set beside chance and controls; nothing where none was measured."""
    metrics = result.metrics
    tasks = [name.split("/", 1)[1].rsplit("/", 1)[0] for name in metrics if re.match(r"candidates/.*/questions$", name)]
    if not tasks:
        return []
    rows = [
        (
            task,
            *(share(result, f"candidates/{task}/{part}") for part in ("accuracy", "image_only", "text_only")),
            percent(metrics[f"candidates/{task}/chance"]),
            f"{metrics[f'candidates/{task}/questions']:,.0f}",
        )
        for task in sorted(tasks)
    ]
    for name in sorted(name for name in metrics if re.match(r"candidates/.*/mean_accuracy$", name)):
        chance = percent(metrics[name.replace("mean_accuracy", "mean_chance")])
        rows.append((f"{name.split('/')[1]}, mean of its tasks", percent(metrics[name]), "", "", chance, ""))
    explained = tag(
        "p",
        "Each question has a list of options, of which one is right. Right means that it scores above every other. "
        "Where a question has an image and a text, the controls ask with either alone.",
    )
    numbers = table(["Task", "Accuracy", "Image only", "Text only", "Chance", "Questions"], rows)
    return [section("candidates", "Evaluation sets", explained, numbers)]


def training_section(folder: Path, artifacts: Path, metrics: Metrics) -> list[Html]:
    """Curves of history.jsonl, where there are any, and what the training took."""
    history = read_history(artifacts / "history.jsonl")
    rows = [
        ("Parameters", _number(metrics, "model/parameters")),
        ("Steps", f"{max((line['step'] for line in history), default=0):,}"),
        ("Training time", _duration(metrics.get("train/seconds"))),
        ("Pairs per second", _number(metrics, "train/pairs_per_second")),
    ]
    body: list[str] = [tag("p", "No curves were logged.", klass="soft")]
    if history:
        draw_training(folder / "training.png", history)
        body = [chart(folder / "training.png", "Losses, validation, learning rate and speed over the training steps.")]
    return [section("training", "Training", *body, facts(rows))]


def tokenizer_section(folder: Path, artifacts: Path, metrics: Metrics, reads_codes: bool) -> list[Html]:
    """Reconstructions, where there are any, and measures of the codes; whether the encoder sees images as such."""
    source = artifacts / "codebook" / "reconstructions.png"
    names = {
        "codebook/psnr": ("Peak signal-to-noise ratio", "{:.1f} dB"),
        "codebook/reconstruction_mse": ("Mean squared error, pixels in 0..1", "{:.4f}"),
        "codebook/use": ("Codes in use", "{:.1%}"),
        "codebook/perplexity": ("Perplexity of the codes", "{:,.0f}"),
    }
    rows = [
        (label, form.format(metrics[name]).replace("%", " %"))
        for name, (label, form) in names.items()
        if name in metrics
    ]
    role = "The encoder sees images only as codes of this tokenizer: what is lost here is lost."
    if not reads_codes:
        role = "This run's encoder reads pixels; the tokenizer is that of the joint encoders it is compared with."
    body: list[str] = [tag("p", role)]
    if source.is_file():
        shutil.copyfile(source, folder / "reconstructions.png")
        body.append(
            chart(folder / "reconstructions.png", "Held-out images above, their reconstructions from codes below.")
        )
        body.append(tag("p", "Originals above, reconstructions from their codes below.", klass="soft"))
    return [section("tokenizer", "Image tokenizer", *body, facts(rows))]


def data_section(manifest: Mapping[str, Any]) -> Html:
    """What was prepared, what was set aside and why, and the notes of the preparation."""
    counts = manifest["counts"]
    kinds = sorted({kind for part in counts.values() for kind in part.get("pairs", {})})
    rows = [
        (
            split,
            f"{part.get('images', 0):,}",
            f"{part.get('cases', 0):,}",
            *(f"{part.get('pairs', {}).get(kind, 0):,}" for kind in kinds),
        )
        for split, part in counts.items()
    ]
    version = f"Source {manifest.get('source')}, data version {str(manifest.get('data_version'))[:12]}."
    aside = [(_words(reason), f"{count:,}") for reason, count in manifest.get("quarantine", {}).items()]
    copies = [(_words(where), f"{count:,}") for where, count in manifest.get("duplicates", {}).items()]
    body: list[str] = [
        tag("p", version, klass="soft"),
        table(["Split", "Images", "Cases", *(kind_name(kind).capitalize() for kind in kinds)], rows),
        tag(
            "div",
            tag("div", tag("h3", "Set aside"), facts(aside or [("nothing", "0")])),
            tag("div", tag("h3", "Equal images"), facts(copies)) if copies else "",
            klass="pair",
        ),
    ]
    notes = [tag("li", str(note)) for note in manifest.get("notes", [])]
    if notes:
        body += [tag("h3", "Notes"), tag("ul", *notes)]
    return section("data", "Data", *body)


def settings_section(settings: Settings, metrics: Metrics) -> Html:
    """Settings and metrics in full, folded away."""
    text = yaml.safe_dump(settings.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
    numbers = table(["Name", "Value"], [(name, f"{value:.6g}") for name, value in sorted(metrics.items())])
    return section(
        "settings",
        "Settings and all numbers",
        tag("details", tag("summary", "Settings of this run"), tag("pre", text)),
        tag("details", tag("summary", f"All {len(metrics)} metrics, named as in metrics.json"), numbers),
    )


def read_history(path: Path) -> list[dict[str, float]]:
    """The lines of history.jsonl; none where there is no file. Raises FuselipError for a line that is no JSON."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:  # no JSON, or no UTF-8
        raise FuselipError(f"{path} holds a line that is no JSON ({error}); train again to write it anew") from error


def kind_name(kind: str) -> str:
    """What pairs of a kind are called on the page."""
    return {"caption": "captions", "vqa": "questions"}.get(kind, f"{_words(kind)} pairs")


def has_task(result: EvaluationResult, task: str) -> bool:
    """Whether the split had pairs for this task."""
    return any(name.startswith(f"{task}/") for name in result.metrics)


def share(result: EvaluationResult, name: str) -> Html:
    """A metric with its interval; nothing where it was not measured."""
    if name not in result.metrics:
        return Html("")
    return join([percent(result.metrics[name]), " ", tag("small", f"[{interval_text(result, name)}]")])


def _points(result: EvaluationResult, name: str) -> Html:
    """A difference of two shares in percentage points, with its interval."""
    if name not in result.metrics:
        return Html("")
    low, high = (f"{100 * bound:+.1f}" for bound in result.intervals[name])
    return join([f"{100 * result.metrics[name]:+.1f}", " ", tag("small", f"[{low} to {high}]")])


def interval_text(result: EvaluationResult, name: str) -> str:
    """The interval of a metric in percent."""
    low, high = result.intervals[name]
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def percent(share: float) -> str:
    """A share in percent, with a second digit where the first would hide it."""
    digits = 2 if 0 < share < 0.001 else 1
    return f"{100 * share:.{digits}f} %"


def _number(metrics: Metrics, name: str) -> str:
    return f"{metrics[name]:,.0f}" if name in metrics else "unknown"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _words(name: str) -> str:
    return name.replace("_", " ")
