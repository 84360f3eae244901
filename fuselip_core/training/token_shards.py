"""The shards of the tokenize stage as pieces of work of their own, for several processes or machines at once.

All of them see one folder, artifacts/work/tokens/. When no shard is pending, the tokenize stage finds all codes there
and only adds pairs and texts: what it writes is the same however many took part.
"""

from __future__ import annotations

import torch

from fuselip_core.config import Settings
from fuselip_core.data.prepared import PreparedData
from fuselip_core.data.token_writer import TokenStoreWriter
from fuselip_core.files import sha256_of
from fuselip_core.model.processing import TextTokenizer
from fuselip_core.model.titok import TiTok
from fuselip_core.training.tokenize import Tokenizing, store_identity, views_of

Shard = tuple[str, int, int]  # split, first row, row after the last


def pending_shards(settings: Settings) -> list[Shard]:
    """Shards whose codes are not on disk yet. Opens every split for writing: call it once, before `write_shard`."""
    return _open(settings).pending()


def write_shard(settings: Settings, shard: Shard) -> int:
    """Writes the codes of one shard and returns how many images that were; written twice, it is the same."""
    return _open(settings).write(shard)


class SharedTokenizing(Tokenizing):
    """Tokenizing of which others do some shards."""

    def pending(self) -> list[Shard]:
        """See `pending_shards`."""
        rows = self.settings.rows_per_shard
        writers = [self._writer(split) for split in self.prepared.splits]
        return [(each.split, *place) for each in writers if not each.finished for place in each.pending(rows)]

    def write(self, shard: Shard) -> int:
        """See `write_shard`."""
        split, start, stop = shard
        codes = self._codes(split, views_of(self.tokenizer.config.image_size, self.settings), start, stop)
        self._writer(split).write_codes(start, codes)
        return len(codes)

    def _writer(self, split: str) -> TokenStoreWriter:
        shape = (self.prepared.picture_count(split), self.settings.views, self.tokenizer.config.latent_tokens)
        return TokenStoreWriter(self.target, split, *shape, self.identity)


def _open(settings: Settings) -> SharedTokenizing:
    prepared = PreparedData(settings.artifacts / "prepared")
    source = settings.artifacts / "codebook"
    tokenizer = TiTok.load(source).to("cuda" if torch.cuda.is_available() else "cpu")
    codebook = sha256_of(source / "model.safetensors")[:16]
    identity = store_identity(prepared, codebook, tokenizer, settings.tokenize)
    encode_text = TextTokenizer(context_length=77).encode
    work = settings.artifacts / "work" / "tokens"
    return SharedTokenizing(prepared, tokenizer, encode_text, settings.tokenize, identity, work)
