"""The registered model: an MLflow model from code, loaded by MLflow from this very file.

Input is a table with the columns `image` (base64 of an image file, a data URI allowed) and `text`, either one empty but
not both in a row; output is (N, D) float32, unit-norm rows. The stages don't import this file: MLflow runs it.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

# At run time too: MLflow reads the hints of `predict`, and warns where it cannot.
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = ("image", "text")


class FuselipEmbedding(PythonModel):
    """Embeds images, texts, and images with text; the folder of the model is its only artifact."""

    def load_context(self, context: Any) -> None:
        from fuselip_core.model.embedder import Embedder

        self.embedder = Embedder.from_pretrained(context.artifacts["model"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> NDArray[Any]:
        """(N, D) float32; raises an MlflowException (HTTP 400) that names the row and what is wrong with it."""
        images, texts = read_rows(model_input)
        return np.asarray(self.embedder.embed(images=images, texts=texts), dtype=np.float32)


def read_rows(table: pd.DataFrame) -> tuple[list[Image.Image | None], list[str | None]]:
    """The two sides of every row; raises an MlflowException for a row without either or with an unreadable image."""
    if not any(name in table.columns for name in COLUMNS):
        # MLflow drops columns that the signature does not name before they come here.
        others = ", ".join(table.columns) or "no other that the model knows"
        raise _refusal(f"the input has none of the columns {', '.join(COLUMNS)}; it has: {others}")
    if table.empty:
        raise _refusal("the input has no rows")
    images: list[Image.Image | None] = []
    texts: list[str | None] = []
    for row, (image, text) in enumerate(zip(_column(table, "image"), _column(table, "text"), strict=True)):
        if image is None and text is None:
            raise _refusal(f"row {row} has neither image nor text; give at least one of them")
        images.append(None if image is None else _read_image(image, row))
        texts.append(text)
    return images, texts


def _column(table: pd.DataFrame, name: str) -> list[str | None]:
    if name not in table.columns:
        return [None] * len(table)
    return [None if value is None or value != value or not str(value).strip() else str(value) for value in table[name]]


def _read_image(encoded: str, row: int) -> Image.Image:
    from fuselip_core.images import UnreadableImage, decode

    try:
        return decode(base64.b64decode(encoded.rpartition("base64,")[2], validate=True))
    except binascii.Error as error:
        raise _refusal(f"row {row}: image is not base64 of an image file") from error
    except UnreadableImage as error:
        raise _refusal(f"row {row}: image can't be read: {error}") from error


def _refusal(sentence: str) -> MlflowException:
    return MlflowException(sentence, error_code=INVALID_PARAMETER_VALUE)


mlflow.models.set_model(FuselipEmbedding())
