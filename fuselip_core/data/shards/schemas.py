"""Columns of the prepared tables."""

from __future__ import annotations

import pyarrow as pa

IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("bytes", pa.binary()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("modality", pa.string()),
        ("concepts", pa.list_(pa.string())),
        ("case", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("attribution", pa.string()),
        ("row_hash", pa.string()),
    ]
)
# Images derived from others on reading (transforms.apply_edit); their rows follow those of the images.
MADE_SCHEMA = pa.schema([("image_id", pa.string()), ("source", pa.string()), ("edit", pa.string())])
PAIR_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "pair_id",
            "split",
            "kind",
            "group",
            "case",
            "query_image",
            "query_text",
            "target_image",
            "target_text",
            "answer_type",
            "row_hash",
        )
    ]
)
CANDIDATES_SCHEMA = pa.schema(
    [
        ("candidates_id", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("query_image", pa.string()),
        ("query_text", pa.string()),
        ("options", pa.string()),
        ("answer", pa.int32()),
        ("row_hash", pa.string()),
    ]
)
OPTIONS_SCHEMA = pa.schema(
    [("options_id", pa.string()), ("images", pa.list_(pa.string())), ("texts", pa.list_(pa.string()))]
)
