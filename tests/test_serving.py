"""What the registered model refuses and accepts, without MLflow's server."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from fuselip_core.registry.served_model import FuselipEmbedding, read_rows


def encoded(side: int = 8) -> str:
    stream = io.BytesIO()
    Image.new("L", (side, side), 100).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_rows_of_every_kind_are_read() -> None:
    table = pd.DataFrame(
        {"image": [encoded(8), None, f"data:image/png;base64,{encoded(4)}", float("nan")], "text": ["a", "b", " ", "c"]}
    )
    images, texts = read_rows(table)
    assert [None if image is None else image.size for image in images] == [(8, 8), None, (4, 4), None]
    assert texts == ["a", "b", None, "c"]


@pytest.mark.parametrize("name", ["image", "text"])
def test_one_column_is_enough(name: str) -> None:
    images, texts = read_rows(pd.DataFrame({name: [encoded()]}))
    assert (images[0] is None) != (texts[0] is None)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"image": [None, None], "text": ["a", None]}, "row 1 has neither image nor text"),
        ({"text": ["a", ""]}, "row 1 has neither"),
        ({"caption": ["a"]}, "none of the columns image, text; it has: caption"),
        ({"text": []}, "no rows"),
        ({"image": ["not base64!"], "text": ["a"]}, "row 0: image is not base64"),
        ({"image": [base64.b64encode(b"no image").decode()]}, "row 0: image can't be read"),
        ({"image": [encoded()[:60] + "=="]}, "row 0: image"),
    ],
)
def test_wrong_rows_are_named_and_answered_with_a_client_error(table: dict[str, Any], words: str) -> None:
    with pytest.raises(MlflowException) as caught:
        read_rows(pd.DataFrame(table))
    assert words in caught.value.message
    assert caught.value.get_http_status_code() == 400


def test_predict_gives_float32_rows() -> None:
    class Stub:
        def embed(self, images: list[Any], texts: list[Any]) -> Any:
            return np.ones((len(images), 4))

    model = FuselipEmbedding()
    model.embedder = Stub()
    result = model.predict(None, pd.DataFrame({"text": ["a", "b"]}))
    assert result.shape == (2, 4) and result.dtype == np.float32
