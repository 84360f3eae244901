"""The registered model: an MLflow "model from code". MLflow runs this file; the stages don't import it.

Input: a table with the columns `image` (base64 of an image file, or a data URI) and `text`; each row needs at least one
of them. Output: (N, D) float32, unit-norm rows. A text that is too long for the model is refused, or cut if the
parameter `truncate` is true. The rules are those of `request_rules`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

# At run time too, since MLflow evaluates the type hints of `predict`.
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = ("image", "text")


class Refusal(MlflowException):
    """An invalid request (HTTP 400). Its message cannot be changed: MLflow's server would prepend the data."""

    def __init__(self, sentence: str, error_code: int = INVALID_PARAMETER_VALUE) -> None:
        self._sentence = sentence
        super().__init__(sentence, error_code=error_code)

    @property
    def message(self) -> str:
        return self._sentence

    @message.setter
    def message(self, value: str) -> None:
        pass


class FuselipEmbedding(PythonModel):
    """Embeds images, texts, and images with text."""

    def load_context(self, context: Any) -> None:
        from fuselip_core.model.embedder import Embedder

        self.embedder = Embedder.from_pretrained(context.artifacts["model"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> NDArray[Any]:
        """(N, D) float32; raises Refusal for a bad row, and with HTTP 500 for an embedding that is not finite."""
        from fuselip_core import request_rules

        images, texts = read_rows(as_table(model_input))
        tokenizer, truncate = self.embedder.processor.text_tokenizer, bool((params or {}).get("truncate"))
        try:
            texts = [
                None if text is None else request_rules.fit_text(tokenizer, row, text, truncate)
                for row, text in enumerate(texts)
            ]
        except request_rules.Refusal as error:
            raise Refusal(str(error)) from None
        embeddings = np.asarray(self.embedder.embed(images=images, texts=texts), dtype=np.float32)
        if bad := np.flatnonzero(~np.isfinite(embeddings).all(axis=1)).tolist():
            raise Refusal(f"row {bad[0]}: the embedding is not finite; the model is damaged", INTERNAL_ERROR)
        return embeddings


def as_table(data: Any) -> pd.DataFrame:
    """The request as a table; for `inputs` and `instances` MLflow passes columns."""
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, dict):
        try:
            return pd.DataFrame({name: list(np.atleast_1d(values)) for name, values in data.items()}, dtype=object)
        except ValueError as error:
            raise Refusal("the columns of the input differ in length; fill them up") from error
    raise Refusal("the input is not a table; send dataframe_records or dataframe_split")


def read_rows(table: pd.DataFrame) -> tuple[list[Image.Image | None], list[str | None]]:
    """Images and texts of all rows; raises Refusal as `request_rules.read_row` does."""
    from fuselip_core import request_rules

    if not set(table.columns) <= set(COLUMNS) or table.columns.has_duplicates or not len(table.columns):
        raise Refusal("the columns of the input are not image, text or both, once each; rename or drop the others")
    if table.empty:
        raise Refusal("the input has no rows; send at least one")
    try:
        rows = [
            request_rules.read_row(row, image, text)
            for row, (image, text) in enumerate(zip(_column(table, "image"), _column(table, "text"), strict=True))
        ]
    except request_rules.Refusal as error:
        raise Refusal(str(error)) from None
    return [image for image, _ in rows], [text for _, text in rows]


def _column(table: pd.DataFrame, name: str) -> list[Any]:
    """The values of a column, with None for missing ones."""
    if name not in table.columns:
        return [None] * len(table)
    return [
        None if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)) else value
        for value in table[name]
    ]


mlflow.models.set_model(FuselipEmbedding())
