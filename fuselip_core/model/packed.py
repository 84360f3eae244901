"""Sequences of any length behind one another, without padding.

A matrix product costs the same for a padded place as for a token; only attention needs to know where a sequence ends.
So everything but attention sees T tokens in a row, and attention sees one run of equally long sequences after another.
Legend: B sequences, L tokens of one, T tokens of all, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fuselip_core.model.vocabulary import PAD, first_end


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed batch lie.

    positions (T) int64, each token's place in its sequence; boundaries (B + 1) int32; pooled (B) int64, the place of
    each sequence's first end-of-text token; runs, in order, as (number of sequences, their length); longest in tokens.
    """

    positions: Tensor
    boundaries: Tensor
    pooled: Tensor
    runs: tuple[tuple[int, int], ...]
    longest: int

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        return replace(
            self,
            positions=self.positions.to(device, non_blocking=True),
            boundaries=self.boundaries.to(device, non_blocking=True),
            pooled=self.pooled.to(device, non_blocking=True),
        )


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, Layout, Tensor]:
    """Padded joint ids, a matrix (B_i, L_i) int64 a group, on the CPU → packed ids (T) int64, their layout, and order.

    Sequences are sorted by length; `order` (B) int64 is the place in the layout of each sequence as given. Padding is
    left out wherever it stands, since no token sees it and it sees nothing that is used.
    """
    lengths = torch.cat([(group != PAD).sum(dim=1) for group in groups])
    by_length = torch.argsort(lengths, stable=True)
    width = max(group.shape[1] for group in groups)
    matrix = torch.cat([F.pad(group, (0, width - group.shape[1]), value=PAD) for group in groups])[by_length]
    kept = matrix != PAD
    ids = matrix[kept]
    lengths = lengths[by_length]
    boundaries = F.pad(lengths.cumsum(0), (1, 0))
    ends = first_end(matrix)
    before_end = torch.arange(width) < ends[:, None]
    layout = Layout(
        positions=torch.arange(width).expand(matrix.shape)[kept],
        boundaries=boundaries.to(torch.int32),
        pooled=boundaries[:-1] + (kept & before_end).sum(dim=1),
        runs=_runs(lengths),
        longest=int(lengths[-1]),
    )
    return ids, layout, torch.argsort(by_length)


def pack_equal(count: int, length: int, device: torch.device) -> Layout:
    """Layout of `count` sequences of one length that are pooled at their first token."""
    boundaries = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)
    positions = torch.arange(length, device=device).repeat(count)
    return Layout(positions, boundaries, boundaries[:-1].long(), ((count, length),), length)


def _runs(lengths: Tensor) -> tuple[tuple[int, int], ...]:
    values, counts = torch.unique_consecutive(lengths, return_counts=True)
    return tuple(zip(counts.tolist(), values.tolist(), strict=True))


def packed_attention(projected: Tensor, heads: int, layout: Layout) -> Tensor:
    """Queries, keys and values (T, 3 D) of packed sequences → attended values (T, D); no sequence sees another.

    In half precision on a GPU one kernel walks the boundaries; elsewhere each run of equal lengths is one call.
    """
    if projected.is_cuda and projected.dtype in (torch.bfloat16, torch.float16):
        return _boundary_attention(projected, heads, layout)
    return _run_attention(projected, heads, layout.runs)


@torch.compiler.disable  # every batch has other runs, and each would be compiled
def _run_attention(projected: Tensor, heads: int, runs: Sequence[tuple[int, int]]) -> Tensor:
    width = projected.shape[1] // 3
    mixed = []
    for piece, (count, length) in zip(projected.split([count * length for count, length in runs]), runs, strict=True):
        parts = piece.view(count, length, 3 * width).chunk(3, dim=-1)
        query, key, value = (p.view(count, length, heads, width // heads).transpose(1, 2) for p in parts)
        attended = F.scaled_dot_product_attention(query, key, value)
        mixed.append(attended.transpose(1, 2).reshape(count * length, width))
    return torch.cat(mixed)


def _boundary_attention(projected: Tensor, heads: int, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shape = (projected.shape[0], heads, projected.shape[1] // (3 * heads))
    query, key, value = (part.reshape(shape) for part in projected.chunk(3, dim=-1))
    bounds = layout.boundaries
    mixed = varlen_attn(query, key, value, bounds, bounds, layout.longest, layout.longest)
    assert isinstance(mixed, Tensor)  # a pair only where its auxiliary output is asked for
    return mixed.reshape(projected.shape[0], -1)
