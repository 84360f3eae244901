"""Results compared with chance and controls, as rows of a table and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Row = dict[str, str]
NO_BETTER = "not distinguishable from chance"
# Task, its description, and the metric with the size of the pool.
ASKED = {
    "image_to_text": (
        "Image → caption",
        "Given an image, finds the right caption among {pool}",
        "retrieval/pool",
    ),
    "text_to_image": (
        "Caption → image",
        "Given a caption, finds the right image among {pool}",
        "retrieval/pool_images",
    ),
}
CONTROLS = {
    "question_only": "question alone",
    "image_only": "image alone",
    "blank_image": "blank image",
    "shuffled_image": "another image",
    "majority": "most frequent answer",
    "majority_by_question": "most frequent answer to the question",
}
# Words for a metric, the metric, its control, and words for that; rows without their metric are left out.
COMPARISONS = (
    ("image → text, recall@1", "retrieval/image_to_text/recall_at_1", "retrieval/image_to_text/chance_at_1", "chance"),
    ("", "", "retrieval_shuffled/image_to_text/recall_at_1", "pairs shuffled"),
    (
        "image → text, mean 1 / rank",
        "retrieval/image_to_text/mean_reciprocal_rank",
        "retrieval_shuffled/image_to_text/mean_reciprocal_rank",
        "pairs shuffled",
    ),
    ("text → image, recall@1", "retrieval/text_to_image/recall_at_1", "retrieval/text_to_image/chance_at_1", "chance"),
    ("", "", "retrieval_shuffled/text_to_image/recall_at_1", "pairs shuffled"),
    (
        "text → image, mean 1 / rank",
        "retrieval/text_to_image/mean_reciprocal_rank",
        "retrieval_shuffled/text_to_image/mean_reciprocal_rank",
        "pairs shuffled",
    ),
    ("answers, image and question", "answers/fused/accuracy", "answers/majority/accuracy", "commonest answer"),
    ("", "", "answers/question_only/accuracy", "question alone"),
    ("", "", "answers/image_only/accuracy", "image alone"),
    ("", "", "answers/blank_image/accuracy", "blank image"),
    ("", "", "answers/shuffled_image/accuracy", "shuffled image"),
    (
        "answers, mean 1 / rank",
        "answers/fused/mean_reciprocal_rank",
        "answers/shuffled_image/mean_reciprocal_rank",
        "shuffled image",
    ),
)


# Metrics for comparing runs in a tracking service; metrics.json has all.
HEADLINES = {
    "image_to_text_recall_at_1": "retrieval/image_to_text/recall_at_1",
    "image_to_text_recall_at_10": "retrieval/image_to_text/recall_at_10",
    "text_to_image_recall_at_1": "retrieval/text_to_image/recall_at_1",
    "text_to_image_recall_at_10": "retrieval/text_to_image/recall_at_10",
    "answer_accuracy": "answers/fused/accuracy",
    "answer_accuracy_over_best_control": "answers/fused/over_best_control",
}


def headlines(metrics: Mapping[str, float]) -> dict[str, float]:
    """The main results as ``results/<name>``, without those that were not measured."""
    return {f"results/{shown}": metrics[name] for shown, name in HEADLINES.items() if name in metrics}


def comparison_rows(metrics: dict[str, float]) -> list[Row]:
    """Rows of measure, value, control and value of the control."""
    rows = []
    for measure, name, control, words in COMPARISONS:
        if control in metrics and (not name or name in metrics):
            value = f"{metrics[name]:.3f}" if name else ""
            rows.append(
                {"measure": measure, "value": value, "control": words, "value of control": f"{metrics[control]:.3f}"}
            )
    return rows


@dataclass(frozen=True)
class Finding:
    """The result of a task in words. better: the interval of the difference to every control is above 0."""

    task: str
    sentence: str
    verdict: str
    better: bool


def findings(metrics: Mapping[str, float]) -> list[Finding]:
    """One finding for each task, from the numbers of metrics.json."""
    found = [
        _retrieval_finding(metrics, direction) for direction in ASKED if f"retrieval/{direction}/recall_at_1" in metrics
    ]
    found += [_answer_finding(metrics)] if "answers/fused/accuracy" in metrics else []
    found += [_class_finding(metrics)] if "classes/zero_shot/accuracy" in metrics else []
    return found + ([_concept_finding(metrics)] if "concepts/probe/f1" in metrics else [])


def _retrieval_finding(metrics: Mapping[str, float], direction: str) -> Finding:
    task, asked, pool_name = ASKED[direction]
    name = f"retrieval/{direction}"
    k, words = (10, "in the first ten") if metrics[f"{name}/chance_at_10"] < 0.5 else (1, "first")
    chance, pool = metrics[f"{name}/chance_at_{k}"], metrics[pool_name]
    sentence = f"{asked.format(pool=f'{pool:,.0f}')} {words} for {share_text(metrics, f'{name}/recall_at_{k}')}"
    low, high = (metrics[f"{name}/recall_at_{k}/{end}"] for end in ("low", "high"))
    better = low > chance and metrics[f"{name}/gain/recall_at_{k}/low"] > 0
    verdict = "better than chance" if better else "worse than chance" if high < chance else NO_BETTER
    return Finding(task, f"{sentence}; chance is {percent(chance)}.", verdict, better)


def _answer_finding(metrics: Mapping[str, float]) -> Finding:
    controls = {
        label: f"answers/{query}/accuracy"
        for query, label in CONTROLS.items()
        if f"answers/{query}/accuracy" in metrics
    }
    best = max(controls, key=lambda label: metrics[controls[label]])
    right, chance = share_text(metrics, "answers/fused/accuracy"), metrics["answers/chance"]
    sentence = (
        f"Given an image and a question, finds the right answer among {metrics['answers/pool']:,.0f} first for "
        f"{right}; "
        f"the strongest control ({best}) reaches {percent(metrics[controls[best]])}, chance is {percent(chance)}."
    )
    better = metrics["answers/gain/smallest/low"] > 0
    verdict = "better than every control" if better else f"not distinguishable from its strongest control ({best})"
    return Finding(
        "Image + question → answer",
        sentence,
        verdict if metrics["answers/fused/accuracy/low"] > chance else NO_BETTER,
        better and metrics["answers/fused/accuracy/low"] > chance,
    )


def _class_finding(metrics: Mapping[str, float]) -> Finding:
    name = "classes/zero_shot/accuracy"
    frequent = metrics["classes/most_frequent/accuracy"]
    sentence = (
        f"Given an image, finds the caption of its class among {1 / metrics['classes/chance']:.0f} for "
        f"{share_text(metrics, name)}; the most frequent class is right for {percent(frequent)}."
    )
    controls = {"most_frequent": "the most frequent class", "other_image": "another image"}
    equal = [words for control, words in controls.items() if metrics[f"classes/gain/{control}/accuracy/low"] <= 0]
    verdict = f"not distinguishable from {' or '.join(equal)}" if equal else "better than every control"
    return Finding("Image → caption of its class", sentence, verdict, not equal)


def _concept_finding(metrics: Mapping[str, float]) -> Finding:
    name, control = "concepts/probe/f1", metrics["concepts/most_frequent/f1"]
    half = (metrics[f"{name}/high"] - metrics[f"{name}/low"]) / 2
    sentence = (
        f"A linear probe of the image embedding names the concepts of an image with an F1 of {metrics[name]:.3f} ± "
        f"{half:.3f}; always naming the most frequent ones reaches {control:.3f}."
    )
    better = metrics["concepts/gain/probe/f1/low"] > 0
    verdict = f"{'better than' if better else 'not distinguishable from'} naming the most frequent concepts"
    return Finding("Image → concepts", sentence, verdict, better)


def share_text(metrics: Mapping[str, float], name: str) -> str:
    """A share in percent with half its interval, such as 38 ± 4 %."""
    half = 50 * (metrics[f"{name}/high"] - metrics[f"{name}/low"])
    digits = 0 if half >= 1 else 1
    return f"{100 * metrics[name]:.{digits}f} ± {half:.{digits}f} %"


def percent(share: float) -> str:
    """A share in percent, with a second decimal if it is very small."""
    return f"{100 * share:.{2 if 0 < share < 0.001 else 1}f} %"
