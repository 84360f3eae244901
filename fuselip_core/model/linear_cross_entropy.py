"""Cross-entropy over a large vocabulary without holding all logits at once.

Legend: M predicted tokens, W width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS_AT_ONCE = 512  # x 53,505 logits are 110 MB; larger chunks are hardly faster


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T + bias` (M, V) and `labels` (M) int64: a float32 scalar.

    Equal to torch's own, but with ROWS_AT_ONCE rows of logits alive at a time: the gradients are made in the forward
    pass, while a chunk's logits are at hand. `hidden` is (M, W), `weight` (V, W), `bias` (V). No rows give 0 and
    gradients of 0.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wanted = any(ctx.needs_input_grad)
        hidden_grad, bias_grad = (torch.zeros_like(each, dtype=torch.float32) for each in (hidden, bias))
        weight_grad: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(labels), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                part, label = hidden[rows].to(dtype), labels[rows, None]
                logits = (part @ matrix.T).float().add_(bias)
                error = logits.softmax(dim=1)
                # torch's softmax is several times faster than its exp and logsumexp, and its top holds the sum.
                log_sum = logits.amax(dim=1, keepdim=True) - error.amax(dim=1, keepdim=True).log()
                total += (log_sum - logits.gather(1, label)).sum()
                del logits
                if wanted:
                    error.scatter_add_(1, label, error.new_full(label.shape, -1.0))
                    bias_grad += error.sum(dim=0)
                    error = error.to(dtype)
                    hidden_grad[rows] = (error @ matrix).float()
                    weight_grad = _add_product(weight_grad, error.T, part)
        if wanted:
            if weight_grad is None:  # no row
                weight_grad = torch.zeros_like(weight, dtype=torch.float32)
            ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = [each.dtype for each in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the gradient of a large vocabulary is dear to copy, and nobody asks for it twice.
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(grad.mul_(outer[0]).to(dtype) for grad, dtype in grads), None)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total` + `left` @ `right` in float32, in place where the types agree; the first product needs no zeros."""
    if total is None:
        return (left @ right).float()
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)
