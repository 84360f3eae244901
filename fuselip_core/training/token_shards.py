"""The shards of the tokenize stage as pieces of work of their own, for several processes or machines at once.

All of them see one folder, artifacts/work/tokens/. When no shard is pending, the tokenize stage finds all codes there
and only adds pairs and texts: what it writes is the same however many took part.
"""

from __future__ import annotations

from fuselip_core.config import Settings
from fuselip_core.tokenizer.tokenize import Tokenizing, open_tokenizing

Shard = tuple[str, int, int]  # split, first row, row after the last


def pending_shards(settings: Settings) -> list[Shard]:
    """Shards whose codes are not on disk yet. Opens every split for writing: call it once, before `write_shard`."""
    work = open_tokenizing(settings)
    writers = [work.writer(split) for split in work.prepared.splits]
    rows = settings.tokenize.rows_per_shard
    return [(each.split, *place) for each in writers if not each.finished for place in each.pending(rows)]


def write_shard(settings: Settings, shard: Shard) -> int:
    """Writes the codes of one shard and returns how many images that were; written twice, it is the same."""
    work: Tokenizing = open_tokenizing(settings)
    split, start, stop = shard
    work.write_shard(work.writer(split), start, stop)
    return stop - start
