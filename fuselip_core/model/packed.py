"""Sequences of any length behind one another, without padding.

A matrix product costs the same for a padded place as for a token; only attention needs to know where a sequence ends.
So everything but attention sees T tokens in a row, and attention sees one run of equally long sequences after another.
Legend: B sequences, L tokens of one, T tokens of all, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuselip_core.model.vocabulary import PAD, first_end


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed batch lie.

    positions (T) int64, each token's place in its sequence; boundaries (B + 1) int32; pooled (B) int64, the place of
    each sequence's first end-of-text token; runs, in order, as (number of sequences, their length); longest in tokens.
    Where T is a budget, the last of the boundaries are those of sequences of padding, which nobody reads.
    """

    positions: Tensor
    boundaries: Tensor
    pooled: Tensor
    runs: tuple[tuple[int, int], ...]
    longest: int

    def each(self, move: Callable[[Tensor], Tensor]) -> Layout:
        """The same layout with `move` applied to every tensor."""
        tensors: dict[str, Any] = {name: move(getattr(self, name)) for name in ("positions", "boundaries", "pooled")}
        return replace(self, **tensors)


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
    return tuple((count, length) for count, length in zip(counts.tolist(), values.tolist(), strict=True) if length)


def packed_attention(projected: Tensor, heads: int, layout: Layout) -> Tensor:
    """Queries, keys and values (T, 3 D) of packed sequences → attended values (T, D); no sequence sees another.

    In half precision on a GPU one kernel walks the boundaries; elsewhere each run of equal lengths is one call, which
    in a compiled graph is one operation, since every batch has other runs and each would be compiled.
    """
    if projected.is_cuda and projected.dtype in (torch.bfloat16, torch.float16):
        return _boundary_attention(projected, heads, layout)
    if torch.compiler.is_compiling():
        return _attend(projected, layout.boundaries, heads)
    return _run_attention(projected, heads, layout.runs)


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


@torch.library.custom_op("fuselip::attend", mutates_args=())
def _attend(projected: Tensor, boundaries: Tensor, heads: int) -> Tensor:
    return _run_attention(projected, heads, _runs(boundaries.diff()))


@_attend.register_fake
def _(projected: Tensor, boundaries: Tensor, heads: int) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[1] // 3)


@torch.library.custom_op("fuselip::attend_backward", mutates_args=())
def _attend_backward(gradient: Tensor, projected: Tensor, boundaries: Tensor, heads: int) -> Tensor:
    """Gradient (T, 3 D) of `projected`, with the attention matrix of a run at hand."""
    found = torch.empty_like(projected)
    size, start = projected.shape[1] // (3 * heads), 0
    for count, length in _runs(boundaries.diff()):
        rows = slice(start, start := start + count * length)
        query, key, value = projected[rows].view(count, length, 3, heads, size).permute(2, 0, 3, 1, 4)
        outer = gradient[rows].view(count, length, heads, size).transpose(1, 2)
        shares = (query @ key.transpose(-1, -2) * size**-0.5).softmax(dim=-1)
        of_shares = outer @ value.transpose(-1, -2)
        of_logits = shares * (of_shares - (of_shares * shares).sum(dim=-1, keepdim=True)) * size**-0.5
        grads = torch.stack([of_logits @ key, of_logits.transpose(-1, -2) @ query, shares.transpose(-1, -2) @ outer])
        found[rows] = grads.permute(1, 3, 0, 2, 4).reshape(count * length, -1)
    return found


@_attend_backward.register_fake
def _(gradient: Tensor, projected: Tensor, boundaries: Tensor, heads: int) -> Tensor:
    return torch.empty_like(projected)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    projected, boundaries, ctx.heads = inputs
    ctx.save_for_backward(projected, boundaries)


def _attend_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _attend_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.heads), None, None


_attend.register_autograd(_attend_gradient, setup_context=_keep)
