"""What the registered model refuses and accepts, without MLflow's server."""

from __future__ import annotations

import base64
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from fuselip_core.model.processing import TextTokenizer
from fuselip_core.registry.served_model import FuselipEmbedding, Refusal, read_rows


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
        ({"caption": ["Mr Smith"]}, "are not image, text or both"),
        ({"text": ["a"], "Mr Smith": ["b"]}, "are not image, text or both"),
        ({}, "are not image, text or both"),
        ({"text": []}, "no rows"),
        ({"text": ["a", 5]}, "row 1: text is not a string"),
        ({"text": [5, 6]}, "row 0: text is not a string"),
        ({"text": [5, None]}, "row 0: text is not a string"),
        ({"text": ["a", True]}, "row 1: text is not a string"),
        ({"text": ["a", ["Mr Smith"]]}, "row 1: text is not a string"),
        ({"text": [{"Mr Smith": 1}]}, "row 0: text is not a string"),
        ({"image": [7], "text": ["a"]}, "row 0: image is not a string"),
        ({"image": ["Mr Smith!"], "text": ["a"]}, "row 0: image is not base64"),
        ({"image": ["Mr Schäfer"], "text": ["a"]}, "row 0: image is not base64"),
        ({"image": [base64.b64encode(b"Mr Smith").decode()]}, "row 0: image can't be read (not an image)"),
        ({"image": [encoded()[:60] + "=="]}, "row 0: image"),
    ],
)
def test_wrong_rows_are_named_and_answered_with_a_client_error(table: dict[str, Any], words: str) -> None:
    with pytest.raises(MlflowException) as caught:
        read_rows(pd.DataFrame(table))
    assert words in caught.value.message
    assert "Smith" not in str(caught.value) + caught.value.message
    assert caught.value.get_http_status_code() == 400


class Stub:
    """An embedder of texts and images that says what its test wants."""

    processor = SimpleNamespace(text_tokenizer=TextTokenizer(8))

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def embed(self, images: list[Any], texts: list[Any]) -> Any:
        return np.full((len(images), 4), self.value)


def model_with(embedder: Stub) -> FuselipEmbedding:
    model = FuselipEmbedding()
    model.embedder = embedder
    return model


def test_predict_gives_float32_rows() -> None:
    result = model_with(Stub()).predict(None, pd.DataFrame({"text": ["a", "b"]}))
    assert result.shape == (2, 4) and result.dtype == np.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_does_not_leave(value: float) -> None:
    with pytest.raises(MlflowException, match="row 0: the embedding is not finite") as caught:
        model_with(Stub(value)).predict(None, pd.DataFrame({"text": ["a"]}))
    assert caught.value.get_http_status_code() == 500


def test_a_long_text_is_refused_or_cut_as_asked() -> None:
    table = pd.DataFrame({"text": ["one two three four five six", "one two three four five six seven"]})
    model = model_with(Stub())
    with pytest.raises(MlflowException, match="row 1: the text has 7 tokens and the model reads 6"):
        model.predict(None, table)
    assert model.predict(None, table, {"truncate": True}).shape == (2, 4)


def test_the_sentence_of_a_refusal_cannot_be_put_behind_the_data() -> None:
    """MLflow's scoring server writes `message` anew, with the whole request in it."""
    refusal = Refusal("row 0 is wrong")
    refusal.message = "Failed to predict data 'Mr Smith'. Error: row 0 is wrong"
    assert json.loads(refusal.serialize_as_json())["message"] == "row 0 is wrong"


def test_columns_are_taken_as_well_as_tables() -> None:
    assert model_with(Stub()).predict(None, {"text": np.array(["a", "b"])}).shape == (2, 4)
    for data, words in (({"text": ["a"], "image": [None, None]}, "differ in length"), (np.ones(3), "not a table")):
        with pytest.raises(MlflowException, match=words):
            model_with(Stub()).predict(None, data)
