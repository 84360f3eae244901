"""Which two metrics stand side by side in a summary: a result and the control it has to beat."""

from __future__ import annotations

Row = dict[str, str]
# Metric, what it is measured against, and the words for both; rows whose metric is absent are left out.
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


def comparison_rows(metrics: dict[str, float]) -> list[Row]:
    """One row a comparison: measure, value, control, value of the control."""
    rows = []
    for measure, name, control, words in COMPARISONS:
        if control in metrics and (not name or name in metrics):
            value = f"{metrics[name]:.3f}" if name else ""
            rows.append(
                {"measure": measure, "value": value, "control": words, "value of control": f"{metrics[control]:.3f}"}
            )
    return rows
