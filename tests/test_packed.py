"""The fast path against the padded reference: packed sequences and the loss over a large vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuselip_core.errors import FuselipError
from fuselip_core.model import linear_cross_entropy as chunks
from fuselip_core.model import packed
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.linear_cross_entropy import linear_cross_entropy
from fuselip_core.model.packed import pack
from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, IGNORED, PAD, join, text_sequence

SMALL = {"width": 32, "heads": 4, "layers": 3, "codebook_size": 50, "codes_per_image": 6, "context_length": 24}


@pytest.fixture
def model() -> FuseLIPModel:
    torch.manual_seed(0)
    return FuseLIPModel(FuseLIPConfig(**SMALL)).double()


def mixed_sequences(model: FuseLIPModel) -> list[Tensor]:
    """Fused and text-only sequences of several lengths, one of them cut, one with the id that is also padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([0, 3, 3, 18])
    bare = torch.randint(1, 49000, (4, 18), generator=generator) * (torch.arange(18) < lengths[:, None])
    bare[1, 1] = PAD
    codes = model.vocabulary.joint_ids(torch.randint(0, 50, (4, 6), generator=generator))
    texts = text_sequence(bare, lengths)
    return [join(codes, texts, 24), join(None, texts[:, :12], 24)[:3]]


def with_labels(ids: Tensor) -> tuple[Tensor, Tensor]:
    hidden = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4) & (ids > END_OF_TEXT)
    return ids.masked_fill(hidden, 49408), ids.masked_fill(~hidden, IGNORED)


def gradients(model: FuseLIPModel, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_equals_padded_in_embeddings_loss_and_every_gradient(model: FuseLIPModel) -> None:
    groups = mixed_sequences(model)
    width = max(group.shape[1] for group in groups)
    padded = torch.cat([F.pad(group, (0, width - group.shape[1])) for group in groups])
    hidden_ids, labels = with_labels(padded)
    reference = model(hidden_ids, labels=labels)
    weights = torch.randn(reference.embeddings.shape, generator=torch.Generator().manual_seed(3))
    wanted = gradients(model, (reference.embeddings * weights).sum() + reference.loss)

    ids, layout, order = pack([hidden_ids[:4], hidden_ids[4:]])
    packed_labels, _, _ = pack([torch.where(labels == IGNORED, hidden_ids, labels)])
    packed_labels = packed_labels.masked_fill(ids != 49408, IGNORED)
    packed = model(ids, labels=packed_labels, layout=layout)
    got = gradients(model, (packed.embeddings[order] * weights).sum() + packed.loss)

    torch.testing.assert_close(packed.embeddings[order], reference.embeddings, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed.loss, reference.loss, atol=1e-5, rtol=0)
    assert got.keys() == wanted.keys() and len(got) > 20
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_without_masked_tokens_has_no_masked_loss(model: FuseLIPModel) -> None:
    ids, layout, _ = pack(mixed_sequences(model))
    output = model(ids, labels=torch.full_like(ids, IGNORED), layout=layout)
    assert output.loss.item() == 0.0
    assert torch.equal(output.embeddings, model(ids, layout=layout).embeddings)


def test_the_last_block_gives_the_same_where_it_is_read(model: FuseLIPModel) -> None:
    ids, layout, _ = pack(mixed_sequences(model))
    read = torch.tensor([0, 7, len(ids) - 1])
    whole, part = model.packed_hidden_states(ids, layout), model.packed_hidden_states(ids, layout, read)
    torch.testing.assert_close(part, whole[read], atol=1e-6, rtol=0)

    padded = mixed_sequences(model)[0]
    places = torch.arange(len(padded)) % padded.shape[1]
    whole, part = model.hidden_states(padded), model.hidden_states(padded, read=places)
    torch.testing.assert_close(part, whole[torch.arange(len(padded)), places].unsqueeze(1), atol=1e-6, rtol=0)
    block, x = model.transformer.resblocks[0], torch.randn(3, 9, model.config.width, dtype=model.dtype)
    torch.testing.assert_close(block(x, read=slice(-4, None)), block(x)[:, -4:], atol=1e-6, rtol=0)


def test_layout_leaves_padding_out_and_pools_at_the_first_end(model: FuseLIPModel) -> None:
    groups = mixed_sequences(model)
    ids, layout, order = pack(groups)
    assert PAD not in ids and len(ids) == sum(int((group != PAD).sum()) for group in groups)
    assert sum(count * length for count, length in layout.runs) == len(ids)
    assert (ids[layout.pooled] == END_OF_TEXT).all()
    start, end = layout.boundaries[order[1]], layout.boundaries[order[1] + 1]
    assert ids[start:end].tolist() == [i for i in groups[0][1].tolist() if i != PAD]
    assert layout.positions[start:end].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]


def test_no_sequence_sees_another(model: FuseLIPModel) -> None:
    ids, layout, _ = pack(mixed_sequences(model))
    before = model(ids, layout=layout).embeddings
    changed = ids.clone()
    changed[int(layout.boundaries[3]) + 1] += 1
    moved = (model(changed, layout=layout).embeddings - before).abs().amax(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == [3]


def test_the_kernel_for_gpus_is_called_as_torch_declares_it(
    model: FuseLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: its declaration takes the call on the meta device, and a plain loop in its place agrees."""
    ids, layout, _ = pack(mixed_sequences(model))
    elsewhere = torch.empty(len(ids), 96, device="meta", dtype=torch.bfloat16, requires_grad=True)
    declared = packed._boundary_attention(elsewhere, 4, layout.each(lambda tensor: tensor.to("meta")))
    declared.sum().backward()
    assert declared.shape == (len(ids), 32) and declared.dtype == torch.bfloat16
    assert elsewhere.grad is not None and elsewhere.grad.shape == elsewhere.shape

    def one_by_one(
        query: Tensor, key: Tensor, value: Tensor, start: Tensor, key_start: Tensor, *longest: int
    ) -> Tensor:
        assert start.dtype == torch.int32 and start is key_start and longest == (24, 24)
        assert all(part.shape == (len(ids), 4, 8) and part.stride(2) == 1 for part in (query, key, value))
        pieces = [part.split(start.diff().tolist()) for part in (query, key, value)]
        mixed = [
            F.scaled_dot_product_attention(*(p.transpose(0, 1) for p in each)) for each in zip(*pieces, strict=True)
        ]
        return torch.cat([each.transpose(0, 1) for each in mixed])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_by_one)
    projected = torch.randn(len(ids), 96, dtype=torch.double)
    torch.testing.assert_close(
        packed._boundary_attention(projected, 4, layout), packed._run_attention(projected, 4, layout.runs)
    )


def test_what_packed_sequences_can_not_do_is_refused(model: FuseLIPModel) -> None:
    long = torch.full((1, 30), 7)
    long[0, 0], long[0, -1] = BEGIN_OF_TEXT, END_OF_TEXT
    ids, layout, _ = pack([long])
    with pytest.raises(FuselipError, match="30 tokens exceeds the context of 24"):
        model(ids, layout=layout)
    reads_padding = FuseLIPModel(FuseLIPConfig(**SMALL, mask_padding=False))
    ids, layout, _ = pack([long[:, 10:]])
    with pytest.raises(FuselipError, match="reads padding"):
        reads_padding(ids, layout=layout)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_chunked_cross_entropy_equals_torchs_own(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "ROWS_AT_ONCE", {"cpu": 3})
    torch.manual_seed(4)
    inputs = [torch.randn(rows, 8), torch.randn(30, 8), torch.randn(30)]
    labels = torch.randint(0, 30, (rows,))
    results = []
    for function in (linear_cross_entropy, lambda h, w, b, y: F.cross_entropy(h @ w.T + b, y, reduction="sum")):
        leaves = [each.clone().requires_grad_() for each in inputs]
        value = function(*leaves, labels)
        (2.0 * value).backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_chunked_cross_entropy_in_half_precision_stays_near() -> None:
    torch.manual_seed(5)
    hidden, weight, bias = torch.randn(9, 16), torch.randn(40, 16, requires_grad=True), torch.zeros(40)
    labels = torch.arange(9)
    exact = linear_cross_entropy(hidden, weight, bias, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, bias, labels)
    rounded.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert rounded.item() != exact.item() and abs(rounded.item() - exact.item()) < 0.02 * exact.item()
