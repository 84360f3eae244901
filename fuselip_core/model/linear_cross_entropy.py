"""Cross-entropy over a large vocabulary without holding all logits at once.

Legend: M predicted tokens, W width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuselip_core.model.vocabulary import IGNORED

# Rows of logits at a time. 512 x 53,505 are 110 MB, and more is hardly faster on a CPU; a GPU has them in bfloat16.
ROWS_AT_ONCE = {"cpu": 512, "cuda": 4096}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, padded: bool = False) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T + bias` (M, V) and `labels` (M) int64: a float32 scalar.

    Equal to torch's own, but with ROWS_AT_ONCE rows of logits alive at a time: the gradients are made in the forward
    pass, while a chunk's logits are at hand. `hidden` is (M, W), `weight` (V, W), `bias` (V). No rows give 0 and
    gradients of 0. If `padded`, rows whose label is IGNORED count for nothing.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, padded)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, padded: bool) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wanted = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            total, *grads = _loss_and_gradients(hidden, weight, bias, labels, dtype, padded, wanted)
        if wanted:
            ctx.save_for_backward(*grads)
        ctx.dtypes = [each.dtype for each in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        if torch.compiler.is_compiling():
            return (*((grad * outer[0]).to(dtype) for grad, dtype in grads), None, None)
        # In place: the gradient of a large vocabulary is dear to copy, and nobody asks for it twice.
        return (*(grad.mul_(outer[0]).to(dtype) for grad, dtype in grads), None, None)


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, dtype: torch.dtype, padded: bool, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, and its gradients in float32 with regard to hidden, weight and bias, meaningless unless `wanted`."""
    hidden_grad, bias_grad = (torch.zeros_like(each, dtype=torch.float32) for each in (hidden, bias))
    weight_grad: Tensor | None = None
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    matrix, at_once = weight.to(dtype), ROWS_AT_ONCE[hidden.device.type]
    for start in range(0, len(labels), at_once):
        rows = slice(start, start + at_once)
        part, label = hidden[rows].to(dtype), labels[rows, None]
        counts = (label != IGNORED).float() if padded else None
        if counts is not None:
            part, label = part * counts.to(dtype), label.clamp(min=0)
        logits = (part @ matrix.T).float().add_(bias)
        error = logits.softmax(dim=1)
        # torch's softmax is several times faster than its exp and logsumexp, and its top holds the sum.
        log_sum = logits.amax(dim=1, keepdim=True) - error.amax(dim=1, keepdim=True).log()
        loss = log_sum - logits.gather(1, label)
        total += loss.sum() if counts is None else (loss * counts).sum()
        del logits
        if wanted:
            error.scatter_add_(1, label, error.new_full(label.shape, -1.0))
            bias_grad += error.sum(dim=0) if counts is None else (error * counts).sum(dim=0)
            error = error.to(dtype)
            back = (error @ matrix).float()
            hidden_grad[rows] = back if counts is None else back * counts
            weight_grad = _add_product(weight_grad, error.T, part)
    if weight_grad is None:  # no row
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
    return total, hidden_grad, weight_grad, bias_grad


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total` + `left` @ `right` in float32, in place where the types agree; the first product needs no zeros."""
    if total is None:
        return (left @ right).float()
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)
