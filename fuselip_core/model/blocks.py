"""The pre-norm transformer block that image tokenizer and joint encoder share.

Parameter names are those of the published checkpoints. Both forms of input are read: padded sequences (B, L, D) with a
mask, and packed ones (T, D) with their layout. Where only some tokens are read afterwards (`read`), the others are keys
and values and nothing more: a slice of the L tokens of each sequence, (B) one place in each, or (R) places among all T.
Legend: B sequences, L tokens of one, T tokens of all, R tokens that are read afterwards, D width.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuselip_core.model.packed import Layout, packed_attention

Read = Tensor | slice | None


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of the number of heads {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(nn.Linear(width, 3 * width).weight.detach()))
        self.in_proj_bias = nn.Parameter(nn.init.zeros_(nn.Linear(width, 3 * width).bias.detach()))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, layout: Layout | None = None, read: Read = None) -> Tensor:
        """(B, L, D) → (B, L, D) or, with a `layout`, (T, D) → (T, D); with `read`, those tokens alone.

        `mask` is boolean, broadcastable to (B, heads, L, L), with `read` (B, 1, 1, L), true where a key is seen.
        """
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if layout is not None:
            return self.out_proj(_rows(packed_attention(projected, self.heads, layout), read))
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        query, key, value = (part.view(shape) for part in projected.chunk(3, dim=-1))
        query, key, value = (part.transpose(1, 2) for part in (_rows(query, read), key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class ResidualBlock(nn.Module):
    """Attention and a two-layer perceptron with GELU, each behind a layer norm and beside a residual path."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, layout: Layout | None = None, read: Read = None) -> Tensor:
        """(B, L, D) → (B, L, D), (T, D) → (T, D), or fewer; `mask`, `layout`, `read` as in Attention."""
        x = _rows(x, read) + self.attn(self.ln_1(x), mask, layout, read)
        return x + self.mlp(self.ln_2(x))


def through(
    blocks: nn.ModuleList, x: Tensor, mask: Tensor | None = None, layout: Layout | None = None, read: Read = None
) -> Tensor:
    """`x` through all `blocks`, the last of which gives what is `read`; arguments as in ResidualBlock."""
    for block in blocks:
        x = block(x, mask, layout, read if block is blocks[-1] else None)
    return x


def _rows(x: Tensor, read: Read) -> Tensor:
    """The tokens of `x`, (T, D) or (B, L, ...), that are read."""
    if read is None:
        return x
    if isinstance(read, slice):
        return x[:, read]
    # Not plain indexing of packed tokens: its gradient adds up with atomics, in another order every time.
    return x.index_select(0, read) if x.ndim == 2 else x[torch.arange(len(x), device=x.device), read].unsqueeze(1)
