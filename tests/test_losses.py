"""The losses against open_clip's, against sums written out, and where nothing is masked."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fuselip_core.encoding.from_codes import mask_tokens
from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, IGNORED, PAD
from fuselip_core.training.losses import SigmoidLoss, akin, sigmoid_contrastive


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1).requires_grad_()


def test_sigmoid_loss_and_gradient_equal_open_clip() -> None:
    from open_clip.loss import SigLipLoss

    ours, theirs = (unit(6, 16, 0), unit(6, 16, 1)), (unit(6, 16, 0), unit(6, 16, 1))
    scale, bias = torch.tensor(math.log(10.0)).exp(), torch.tensor(-10.0)
    mine = sigmoid_contrastive(*ours, scale, bias)
    reference = SigLipLoss()(theirs[0], theirs[1], scale, bias)
    mine.backward()
    reference.backward()
    torch.testing.assert_close(mine, reference)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)


def test_ignored_pairs_leave_the_sum() -> None:
    query, target = unit(3, 8, 2), unit(3, 8, 3)
    scale, bias = torch.tensor(10.0), torch.tensor(-1.0)
    keys = torch.tensor([[5, -1, -1], [7, -1, -1], [5, -1, -1]])
    ignored = akin(keys, keys) & ~torch.eye(3, dtype=torch.bool)
    assert ignored.nonzero().tolist() == [[0, 2], [2, 0]]
    logits = scale * query @ target.T + bias
    kept = [(i, j) for i in range(3) for j in range(3) if (i, j) not in ((0, 2), (2, 0))]
    by_hand = -sum(F.logsigmoid(logits[i, j] * (1 if i == j else -1)) for i, j in kept) / 3
    torch.testing.assert_close(sigmoid_contrastive(query, target, scale, bias, ignored), by_hand)


@pytest.mark.parametrize("belong", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_loss_in_chunks_is_the_whole_one_and_never_holds_all_similarities(rows: int, belong: bool) -> None:
    torch.manual_seed(0)
    others = 7 if belong else 9
    keys, other_keys = torch.randint(0, 3, (7, 3)), torch.randint(0, 3, (others, 3))
    found, largest = [], 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    for chunk in (None, rows):
        left, right = unit(7, 4, 4), unit(others, 4, 5)
        scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
        largest = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = SigmoidLoss(scale, bias, chunk)(left, right, keys, keys if belong else other_keys, belong)
        (3.0 * loss).backward()
        found.append([loss, *(each.grad for each in (left, right, scale, bias))])
        assert (largest >= 7 * others) == (chunk in (None, 7)), "what is kept for the backward pass"
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_masks_hide_the_asked_share_and_no_special_token() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 49000, (64, 50))
    ids[:, 0], ids[:, 20], ids[:, 40:] = BEGIN_OF_TEXT, END_OF_TEXT, PAD
    hidden, labels = mask_tokens(ids, 49408, 0.1)
    places = labels != IGNORED
    assert torch.equal(hidden[places], torch.full_like(hidden[places], 49408))
    assert torch.equal(labels[places], ids[places])
    assert torch.equal(hidden[~places], ids[~places])
    assert not places[:, 0].any() and not places[:, 20].any() and not places[:, 40:].any()
    assert places.sum() / (64 * 38) == pytest.approx(0.1, abs=0.02)


def test_a_repeated_target_is_a_negative_once() -> None:
    query, target = unit(4, 8, 6), unit(4, 8, 7)
    scale, bias = torch.tensor(10.0), torch.tensor(-1.0)
    keys = torch.tensor([[5, -1, -1], [7, -1, -1], [5, -1, -1], [9, -1, -1]])
    logits = scale * query @ target.T + bias
    # Rows 0 and 2 have the same target: no negatives of each other, and one negative of rows 1 and 3.
    left_out = [(0, 2), (2, 0), (1, 2), (3, 2)]
    kept = [(i, j) for i in range(4) for j in range(4) if (i, j) not in left_out]
    by_hand = -sum(F.logsigmoid(logits[i, j] * (1 if i == j else -1)) for i, j in kept) / 4
    for rows in (None, 1, 3):
        loss_of = SigmoidLoss(scale, bias, rows, once=True)
        torch.testing.assert_close(loss_of(query, target, keys, keys, belong=True), by_hand)
