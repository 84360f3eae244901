"""The tables of compare_families.py: mean and standard deviation over the seeds, in percent."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from families_runs import ABLATIONS, ADAPTATIONS, CODES, FAMILIES, FROM_SCRATCH, SEEDS

TITLES = {
    "brain-mri": "brain MRI, test",
    "sample": "sample, test",
    "medpix": "MedPix 2.0, valid",
    "vqa-rad": "VQA-RAD, test",
}
MEASURES = {
    "image → caption, at 1 / 10": ("retrieval/image_to_text/recall_at_1", "retrieval/image_to_text/recall_at_10"),
    "caption → image, at 1 / 10": ("retrieval/text_to_image/recall_at_1", "retrieval/text_to_image/recall_at_10"),
    "image + question → answer / another image": ("answers/fused/accuracy", "answers/shuffled_image/accuracy"),
    "image + instruction → image / instruction alone": (
        "transformations/mean_accuracy",
        "transformations/mean_text_only",
    ),
}
CHANCES = {
    "retrieval/image_to_text/recall_at_1": "retrieval/image_to_text/chance_at_1",
    "retrieval/image_to_text/recall_at_10": "retrieval/image_to_text/chance_at_10",
    "retrieval/text_to_image/recall_at_1": "retrieval/text_to_image/chance_at_1",
    "retrieval/text_to_image/recall_at_10": "retrieval/text_to_image/chance_at_10",
    "answers/fused/accuracy": "answers/majority/accuracy",
    "answers/shuffled_image/accuracy": "answers/majority_by_question/accuracy",
    "transformations/mean_accuracy": "transformations/mean_chance",
}
# Head → metric of the image tokenizer on MedPix's held-out pictures, and its factor.
KEPT = {
    "PSNR, CT / dB": ("psnr/CT", 1.0),
    "PSNR, MR / dB": ("psnr/MR", 1.0),
    "codes in use": ("use", 100.0),
    "perplexity": ("perplexity", 1.0),
}
ADAPTED = (
    "adaptation/{0}/retrieval/image_to_text/recall_at_10/{1}",
    "adaptation/{0}/retrieval/text_to_image/recall_at_10/{1}",
)
# What trials are judged by: ranks, which are steadier than hits, and answers.
JUDGED = (
    "retrieval/image_to_text/mean_reciprocal_rank",
    "retrieval/text_to_image/mean_reciprocal_rank",
    "retrieval/image_to_text/recall_at_10",
    "retrieval/text_to_image/recall_at_10",
    "answers/fused/accuracy",
    "answers/fused/mean_reciprocal_rank",
)

# What the questions on brain MRI ask for; a share is the mean over its questions.
ASPECTS = {
    "place": ("where-does-the-tumour-lie", "in-which-third-of-the-picture-is-the-mass"),
    "size": ("how-large-is-the-lesion", "is-the-tumour-wider-than-40-mm"),
    "kind": (
        "what-kind-of-tumour-is-shown",
        "is-this-a-glioma",
        "is-this-a-meningioma",
        "is-this-a-pituitary-tumour",
    ),
}

Results = list[dict[str, Any]]  # of one label, a seed each


def spread_of(results: Results, names: Iterable[str], scale: float = 100.0) -> str:
    """Mean and standard deviation over the seeds of the first name, and the second behind a slash; "-" without."""
    parts = []
    for name in names:
        values = [scale * each["metrics"][name] for each in results if name in each["metrics"]]
        if values:
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            parts.append(f"{statistics.mean(values):.1f}{deviation}")
    return " / ".join(parts) or "-"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def comparison_table(results: dict[tuple[str, str], Results]) -> list[str]:
    """Families and ablations, a row each, beside chance (for answers: the most frequent one)."""
    lines = [row("data", "model", *MEASURES, "steps"), row(*["---"] * (len(MEASURES) + 3))]
    named = [(data, label, title) for data in TITLES for label, title in FAMILIES.items()]
    named += [("sample", label, f"early fusion {title}") for label, (title, _) in ABLATIONS.items()]
    named.sort(key=lambda entry: list(TITLES).index(entry[0]))
    for data, label, title in named:
        if data == "brain-mri":
            continue  # has a table of its own
        if found := results.get((data, label)):
            steps = f"{found[0]['train']['steps']:,}" + (f" ({len(found)} seeds)" if len(found) != len(SEEDS) else "")
            lines.append(row(TITLES[data], title, *(spread_of(found, names) for names in MEASURES.values()), steps))
        if label == "siglip-mlf" and (found := results.get((data, "fuselip"))):
            chances = ([CHANCES[name] for name in names if name in CHANCES] for names in MEASURES.values())
            lines.append(
                row(
                    TITLES[data],
                    "chance; most frequent answer / to the question",
                    *(spread_of(found[:1], names) for names in chances),
                    "",
                )
            )
    return lines


def brain_table(results: dict[tuple[str, str], Results]) -> list[str]:
    """Families on brain MRI: answers by what is asked, the kind of tumour from captions, and recall at 10."""
    heads = ("all questions", *ASPECTS, "kind by captions", "image → caption at 10", "caption → image at 10", "steps")
    lines = [row("brain MRI, test", *heads), row(*["---"] * (len(heads) + 1))]
    for label, title in FAMILIES.items():
        if found := results.get(("brain-mri", label)):
            cells = _brain_cells(found, "fused", "zero_shot", "recall_at_10")
            lines.append(row(title, *cells, f"{found[0]['train']['steps']:,}"))
            cells = _brain_cells(found, "shuffled_image", "other_image", None)
            lines.append(row(f"{title}, another image", *cells, ""))
    if found := next((results[key] for key in results if key[0] == "brain-mri"), None):
        cells = _brain_cells(found[:1], "majority_by_question", "most_frequent", "chance_at_10")
        lines.append(row("most frequent answer to the question; chance", *cells, ""))
    return lines if len(lines) > 2 else []


def _brain_cells(found: Results, query: str, classes: str, recall: str | None) -> list[str]:
    for each in found:
        metrics = each["metrics"]
        for aspect, questions in ASPECTS.items():
            values = [metrics[f"answers/{query}/accuracy/{question}"] for question in questions]
            metrics[f"{query}/{aspect}"] = statistics.mean(values)
    names = [f"answers/{query}/accuracy", *(f"{query}/{aspect}" for aspect in ASPECTS), f"classes/{classes}/accuracy"]
    names += [f"retrieval/{way}/{recall}" for way in ("image_to_text", "text_to_image")]
    return [spread_of(found, [name]) for name in names]


def adaptation_table(results: dict[tuple[str, str], Results]) -> list[str]:
    """What each guard contributes on the target (MedPix) and on what is to be kept (the sample), recall at 10."""
    heads = (
        "adapted to MedPix",
        "MedPix, valid: image → caption",
        "caption → image",
        "sample, valid: image → caption",
        "caption → image",
        "answers on the sample",
    )
    if not any(data == "adapted" for data, _ in results):
        return []
    lines = ["", row(*heads), row(*["---"] * len(heads))]
    places = [name.format(part, "{0}") for part in ("target", "retention") for name in ADAPTED]
    places.append("adaptation/retention/answers/fused/accuracy/{0}")
    if found := results.get(("adapted", "guarded")):
        lines.append(
            row("before (the sample's model)", *(spread_of(found, [name.format("before")]) for name in places))
        )
    for label, (title, _) in ADAPTATIONS.items():
        if found := results.get(("adapted", label)):
            title = f"{title} ({len(found)} seeds)" if len(found) != len(SEEDS) else title
            lines.append(row(title, *(spread_of(found, [name.format("after")]) for name in places)))
    return lines


def codes_table(results: dict[tuple[str, str], Results]) -> list[str]:
    """What the image tokenizer keeps of MedPix's pictures before and after its adaptation, and retrieval."""
    rows = []
    for data, title in CODES.items():
        found = results.get((data, "fuselip" if data == "medpix" else FROM_SCRATCH))
        # What the sample's tokenizer makes of MedPix was measured before it was fine-tuned there.
        measured, part = (results.get(("retuned", FROM_SCRATCH)), "before/") if data == "adapted" else (found, "")
        if found and measured:
            kept = [spread_of(measured[:1], [f"codebook/{part}{name}"], scale) for name, scale in KEPT.values()]
            retrieval = [name for name in MEASURES.values() if "retrieval" in name[0]]
            rows.append(row(title, *kept, *(spread_of(found, names) for names in retrieval)))
    heads = ("image tokenizer", *KEPT, *[name for name, places in MEASURES.items() if "retrieval" in places[0]])
    return ["", row(*heads), row(*["---"] * len(heads)), *rows] if rows else []
