"""Where a prepared split meets a model of another project, which has its own ids and its own pixels.

Its store has the same pairs, with texts as that model's ids and one code an image: the row of its picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fuselip_core.data.shards.by_row import PictureReader
from fuselip_core.data.shards.in_order import decoding_threads
from fuselip_core.data.tokens.store import SideTokens, TokenStore
from fuselip_core.encoding.from_codes import StoredEncoder
from fuselip_core.encoding.from_pixels import BLACK, open_picture_store
from fuselip_core.model.comparison import TwoTowers

BLACK_SIDE = 256  # pixels of the black picture, which each model brings to its own size
AT_ONCE = 4096  # texts


def open_comparison_store(folder: Path, split: str, model: TwoTowers) -> TokenStore:
    """The store in `folder` with the ids that `model` reads, all texts of one length, and rows in place of codes."""
    store = open_picture_store(folder, split, views=1)
    count = len(store.text_offsets) - 1
    strings = store.texts_of(range(count))
    ids = [model.to_ids(strings[start : start + AT_ONCE]).numpy() for start in range(0, count, AT_ONCE)]
    texts = np.concatenate(ids).astype(np.int32) if ids else np.zeros((0, 1), np.int32)
    return store.with_texts(texts.ravel(), np.arange(count + 1, dtype=np.int64) * texts.shape[1])


class ComparisonEncoder(StoredEncoder):
    """Two towers on such a store; each picture and each text is embedded once."""

    def __init__(self, towers: TwoTowers, pictures: PictureReader) -> None:
        super().__init__(towers.model)
        self.towers, self._pictures = towers, pictures
        self._pool = decoding_threads()
        self._of_image: dict[int, Tensor] = {}
        self._of_text: dict[bytes, Tensor] = {}

    @property
    def text_length(self) -> None:
        """All ids of the store, which are cut already."""

    def _embeddings(self, side: SideTokens) -> Tensor:
        images = {row: int(side.codes[row, 0]) for row in np.flatnonzero(side.has_image)}
        texts = {row: side.text_ids[row].tobytes() for row in np.flatnonzero(side.text_lengths)}
        self._embed_images(sorted(set(images.values()) - self._of_image.keys()))
        self._embed_texts(sorted(set(texts.values()) - self._of_text.keys()))
        width = len(next(iter((self._of_image or self._of_text).values())))
        sums = torch.zeros(len(side), width)
        for row, image in images.items():
            sums[row] += self._of_image[image]
        for row, text in texts.items():
            sums[row] += self._of_text[text]
        return F.normalize(sums, dim=-1)

    def _embed_images(self, rows: list[int]) -> None:
        if rows:
            pictures = list(self._pool.map(self._picture, rows))
            self._of_image |= zip(rows, self.towers.encode_images(pictures).cpu(), strict=True)

    def _embed_texts(self, texts: list[bytes]) -> None:
        if texts:
            ids = np.stack([np.frombuffer(text, np.int32) for text in texts]).astype(np.int64)
            self._of_text |= zip(texts, self.towers.encode_ids(torch.from_numpy(ids)).cpu(), strict=True)

    def _picture(self, row: int) -> Image.Image:
        return Image.new("RGB", (BLACK_SIDE, BLACK_SIDE)) if row == BLACK else self._pictures.picture(row)
