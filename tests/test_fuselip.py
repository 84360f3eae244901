"""The joint encoder: padding, masking, losses, saving. Its numbers are compared in test_fixtures.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel

from fuselip_core.errors import FuselipError
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.presets import ENCODERS, TOKENIZERS
from fuselip_core.model.titok import TiTok, TiTokConfig
from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, IGNORED, TEXT_SIZE

CODEBOOK = TiTokConfig(
    image_size=32, patch_size=16, latent_tokens=4, codebook_size=16, code_size=4, width=32, layers=1, heads=2
)
SHORT = torch.tensor([[BEGIN_OF_TEXT, 5, 6, END_OF_TEXT]])


def tiny(**changes: bool) -> FuseLIPModel:
    torch.manual_seed(0)
    config = FuseLIPConfig(
        width=32, heads=2, layers=2, context_length=16, codebook_size=16, codes_per_image=4, image_size=32, **changes
    )
    return FuseLIPModel(config).eval()


@pytest.fixture(scope="module")
def model() -> FuseLIPModel:
    model = tiny()
    model.attach_image_tokenizer(TiTok(CODEBOOK))
    return model


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_embeddings_have_unit_norm(model: FuseLIPModel, pixels: Tensor) -> None:
    texts = SHORT.repeat(2, 1)
    for embeddings in (model.encode_image(pixels), model.encode_text(texts), model.encode_multimodal(pixels, texts)):
        assert embeddings.shape == (2, 32)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))
    assert (model.encode_text(SHORT, normalize=False).norm() - 1).abs() > 1e-3


def test_no_rows_give_no_embeddings(model: FuseLIPModel, pixels: Tensor) -> None:
    nothing = SHORT.repeat(0, 1)
    for embeddings in (
        model.encode_text(nothing),
        model.encode_image(pixels[:0]),
        model.encode_multimodal(pixels[:0], nothing),
    ):
        assert embeddings.shape == (0, 32)


def test_padding_changes_nothing(model: FuseLIPModel) -> None:
    padded = F.pad(SHORT, (0, 7))
    torch.testing.assert_close(model.embed_ids(padded), model.embed_ids(SHORT), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.embed_ids(SHORT, padded=True), model.embed_ids(SHORT), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(padded), model.embed_ids(SHORT), atol=0, rtol=0)


def test_exclamation_mark_is_not_seen_because_its_id_is_padding(model: FuseLIPModel) -> None:
    ids = torch.tensor([[BEGIN_OF_TEXT, 0, 6, END_OF_TEXT], [BEGIN_OF_TEXT, 5, 6, END_OF_TEXT]])
    before = model.embed_ids(ids)
    embedding = model.token_embedding.weight.data
    kept = embedding[0].clone()
    embedding[0] += 1.0
    after = model.embed_ids(ids)
    embedding[0] = kept
    assert torch.equal(before, after)


def test_text_is_read_in_both_directions(model: FuseLIPModel) -> None:
    hidden = model.hidden_states(torch.tensor([[BEGIN_OF_TEXT, 5, END_OF_TEXT], [BEGIN_OF_TEXT, 6, END_OF_TEXT]]))
    assert not torch.allclose(hidden[0, 0], hidden[1, 0])


def test_tokens_of_an_image(model: FuseLIPModel, pixels: Tensor) -> None:
    ids = model.tokenize_image(pixels)
    assert ids.shape == (2, 4)
    assert int(ids.min()) > TEXT_SIZE
    closed = model.tokenize_image(pixels, append_empty_text=True)
    assert torch.equal(closed[:, :4], ids)
    assert closed[:, 4:].tolist() == [[BEGIN_OF_TEXT, END_OF_TEXT]] * 2
    torch.testing.assert_close(model.embed_ids(closed), model.encode_image(pixels))


def test_half_precision_moves_no_code(model: FuseLIPModel, pixels: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, embeddings = model.tokenize_image(pixels), model.encode_image(pixels)
    assert torch.equal(ids, model.tokenize_image(pixels))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, model.encode_image(pixels), atol=0.02, rtol=0)


def test_masked_loss_equals_full_logits_at_masked_places(model: FuseLIPModel) -> None:
    ids = torch.tensor([[BEGIN_OF_TEXT, 5, 6, END_OF_TEXT], [BEGIN_OF_TEXT, TEXT_SIZE, END_OF_TEXT, 0]])
    labels = torch.tensor([[IGNORED, IGNORED, 9, IGNORED], [IGNORED, 7, IGNORED, IGNORED]])
    output = model(ids, labels=labels)
    logits = model.mask_prediction_head(model.hidden_states(ids))
    assert logits.shape == (2, 4, model.config.vocab_size)
    slow = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(output.loss, slow)
    gradients = [torch.autograd.grad(loss, model.token_embedding.weight)[0] for loss in (output.loss, slow)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)


def test_loss_is_zero_and_not_nan_when_nothing_is_masked(model: FuseLIPModel) -> None:
    loss = model(SHORT, labels=torch.full_like(SHORT, IGNORED)).loss
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, [model.token_embedding.weight, model.mask_prediction_head.bias]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_head_and_embedding_are_one_tensor(model: FuseLIPModel) -> None:
    assert model.mask_prediction_head.decoder.weight is model.token_embedding.weight


def test_image_tokenizer_is_frozen(model: FuseLIPModel) -> None:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith("image_tokenizer.model.") for name in frozen)
    assert len(frozen) == len(list(model.image_tokenizer.parameters()))


def test_without_mask_token_there_is_no_head() -> None:
    model = tiny(mask_token=False)
    assert not any(name.startswith("mask_prediction_head") for name in model.state_dict())
    assert model.config.vocab_size == TEXT_SIZE + 16
    with pytest.raises(FuselipError, match="no mask token"):
        model(SHORT, labels=SHORT)


def test_a_model_with_an_end_of_image_token_is_refused() -> None:
    assert FuseLIPConfig.from_dict({"end_of_image": False}).vocab_size == 53505  # as earlier versions saved it
    with pytest.raises(FuselipError, match=r"end-of-image token \(end_of_image"):
        FuseLIPConfig.from_dict({"end_of_image": True})


def test_wrong_input_is_told(model: FuseLIPModel, pixels: Tensor) -> None:
    with pytest.raises(FuselipError, match="contains no image tokenizer"):
        tiny().encode_image(pixels)
    with pytest.raises(FuselipError, match=r"floating-point and in 0\.\.1"):
        model.encode_image((pixels * 255).to(torch.uint8))
    with pytest.raises(FuselipError, match=r"floating-point and in 0\.\.1"):
        model.encode_image(pixels * 255)
    with pytest.raises(FuselipError, match=r"floating-point and in 0\.\.1"):
        model.encode_image(pixels * torch.nan)
    with pytest.raises(FuselipError, match="takes pixels"):
        model.encode_image(pixels[:, :, :16])
    with pytest.raises(FuselipError, match="2 images but 1 texts"):
        model.encode_multimodal(pixels, SHORT)
    with pytest.raises(FuselipError, match="end-of-text"):
        model.encode_text(torch.tensor([[BEGIN_OF_TEXT, 5]]))
    with pytest.raises(FuselipError, match="exceeds the context of 16"):
        model.embed_ids(F.pad(SHORT, (0, 20)))
    with pytest.raises(FuselipError, match="4 codes of 32 but the model takes 4 of 16"):
        model.attach_image_tokenizer(TiTok(TiTokConfig(image_size=32, latent_tokens=4, codebook_size=32, layers=1)))


@pytest.mark.parametrize("mask_token", [True, False])
def test_saved_model_comes_back_to_the_bit(tmp_path: Path, mask_token: bool) -> None:
    model = tiny(mask_token=mask_token)
    model.attach_image_tokenizer(TiTok(CODEBOOK))
    model.save_pretrained(tmp_path)
    loaded = FuseLIPModel.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert isinstance(AutoModel.from_pretrained(tmp_path), FuseLIPModel)
    if mask_token:
        assert loaded.mask_prediction_head.decoder.weight is loaded.token_embedding.weight


def test_from_pretrained_is_strict(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    config = FuseLIPConfig.from_pretrained(tmp_path)
    config.context_length, config.layers = 12, 3
    with pytest.raises(FuselipError) as caught:
        AutoModel.from_pretrained(tmp_path, config=config)
    assert "missing: transformer.resblocks.2." in str(caught.value)
    assert "positional_embedding [16, 32] instead of [12, 32]" in str(caught.value)


@pytest.mark.parametrize("size", list(ENCODERS))
def test_presets(size: str) -> None:
    config = FuseLIPConfig.of_size(size)
    with torch.device("meta"):
        model = FuseLIPModel(config)
    assert (model.config.width, model.config.layers) == (ENCODERS[size].width, ENCODERS[size].layers)
    assert config.codebook_size == TOKENIZERS[size].codebook_size
    assert config.codes_per_image < config.context_length


def test_a_width_of_ones_own_replaces_the_presets_if_its_heads_divide_it() -> None:
    config = FuseLIPConfig.of_size("small", width=96)
    assert (config.width, config.heads, config.layers) == (96, 6, 12)
    with pytest.raises(FuselipError, match=r"model\.width 100 is no multiple of the 6 heads of size small; set 102"):
        FuseLIPConfig.of_size("small", width=100)


def test_unknown_size_is_told() -> None:
    with pytest.raises(FuselipError, match=r"'huge'.*tiny, small, base, large"):
        FuseLIPConfig.of_size("huge")


def test_places_of_a_grid_begin_alike_where_they_are_near() -> None:
    torch.manual_seed(0)
    model = FuseLIPModel(FuseLIPConfig(width=64, heads=4, layers=1, codebook_size=20, codes_per_image=36))
    text = model.positional_embedding[36:].clone()
    model.start_places_from_grid(0.04)
    places = model.positional_embedding[:36].detach()
    assert places.std().item() == pytest.approx(0.04, rel=0.01)
    torch.testing.assert_close(model.positional_embedding[36:], text)
    similar = F.normalize(places, dim=1) @ F.normalize(places, dim=1).T
    rows, columns = torch.arange(36) // 6, torch.arange(36) % 6
    steps = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    by_distance = [similar[steps == distance].mean().item() for distance in (0, 1, 2, 4)]
    assert by_distance == sorted(by_distance, reverse=True) and by_distance[1] > 0.3


def test_places_that_are_no_grid_are_one_sentence() -> None:
    model = FuseLIPModel(FuseLIPConfig(width=32, heads=4, layers=1, codebook_size=20, codes_per_image=128))
    with pytest.raises(FuselipError, match="128 codes an image are no square grid; set train"):
        model.start_places_from_grid(0.04)
