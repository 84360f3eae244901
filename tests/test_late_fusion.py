"""The late-fusion baselines. Their numbers are compared in test_fixtures.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from fuselip_core.errors import FuselipError
from fuselip_core.model.late_fusion import LateFusionConfig, LateFusionModel
from fuselip_core.model.presets import TOWERS, open_clip_config
from fuselip_core.model.towers import image_tower_output, text_tower_output
from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, text_sequence

TEXT = torch.tensor([[BEGIN_OF_TEXT, 5, END_OF_TEXT], [BEGIN_OF_TEXT, END_OF_TEXT, 0]])


def towers() -> dict[str, Any]:
    config = open_clip_config("tiny")
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"image_size": 32, "layers": 1, "width": 64}
    config["text_cfg"] |= {"context_length": 8, "layers": 1, "width": 32, "heads": 2}
    return config


@pytest.fixture(scope="module", params=["add", "magiclens"])
def model(request: pytest.FixtureRequest) -> LateFusionModel:
    torch.manual_seed(0)
    return LateFusionModel(LateFusionConfig(towers=towers(), fusion=request.param)).eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_embeddings_have_unit_norm_and_padding_changes_nothing(model: LateFusionModel, pixels: Tensor) -> None:
    padded = F.pad(TEXT, (0, 4))
    for embeddings in (model.encode_image(pixels), model.encode_text(TEXT), model.encode_multimodal(pixels, TEXT)):
        assert embeddings.shape == (2, 32)
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(model.encode_text(padded), model.encode_text(TEXT))
    alone = torch.cat([model.encode_text(TEXT[:1]), model.encode_text(TEXT[1:, :2])])
    torch.testing.assert_close(alone, model.encode_text(TEXT), atol=1e-6, rtol=0)


def test_image_alone_is_an_image_with_the_empty_text(model: LateFusionModel, pixels: Tensor) -> None:
    empty = TEXT[1:].expand(2, -1)
    torch.testing.assert_close(model.encode_image(pixels), model.encode_multimodal(pixels, empty))


def test_forward_takes_rows_with_and_without_image(model: LateFusionModel, pixels: Tensor) -> None:
    mixed = model(pixels, TEXT, has_image=torch.tensor([True, False])).embeddings
    torch.testing.assert_close(mixed[0], model.encode_multimodal(pixels, TEXT)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[1], model.encode_text(TEXT)[1], atol=1e-6, rtol=0)


def texts_with_repeats() -> Tensor:
    """Six texts of three lengths, two of them equal and two others empty."""
    ids = torch.tensor([[7, 8, 9, 10], [5, 0, 0, 0], [0, 0, 0, 0], [7, 8, 9, 10], [6, 4, 0, 0], [0, 0, 0, 0]])
    return text_sequence(ids, torch.tensor([4, 1, 0, 4, 2, 0]))


def test_towers_compute_what_open_clip_does_with_padding_and_repeats(pixels: Tensor) -> None:
    """Values and gradients of open_clip's own forward passes, from the same weights."""
    config = towers()
    config["text_cfg"]["layers"] = config["vision_cfg"]["layers"] = 2
    torch.manual_seed(0)
    model = LateFusionModel(LateFusionConfig(towers=config, fusion="add")).double()
    reference = open_clip.CustomTextCLIP(
        embed_dim=32,
        vision_cfg=config["vision_cfg"],
        text_cfg={key: value for key, value in config["text_cfg"].items() if key != "mask_pad"},
        init_logit_bias=-10.0,
    ).double()
    reference.text.use_pad_mask = True
    reference.load_state_dict(model.model.state_dict())
    ids, pixels = texts_with_repeats(), pixels.double()
    upstream = torch.randn(8, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.cat([text_tower_output(model.model.text, ids), image_tower_output(model.model.visual, pixels)])
    wanted = torch.cat([reference.encode_text(ids), reference.encode_image(pixels)])
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)
    (found * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    own = {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            own[name], gradient, atol=1e-12, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_towers_of_other_parts_are_refused() -> None:
    for part, option in (("vision_cfg", {"pool_type": "avg"}), ("text_cfg", {"ls_init_value": 0.1})):
        config = towers()
        config[part] |= option
        with pytest.raises(FuselipError, match=r"as published|published ones"):
            LateFusionModel(LateFusionConfig(towers=config))


def test_saved_model_comes_back_to_the_bit(model: LateFusionModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, LateFusionModel)
    assert loaded.config.fusion == model.config.fusion
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_wrong_input_is_told(model: LateFusionModel, pixels: Tensor) -> None:
    with pytest.raises(FuselipError, match="takes float pixels"):
        model.encode_image(pixels[:, :, :16])
    with pytest.raises(FuselipError, match="end-of-text"):
        model.encode_text(TEXT[:, :1])
    with pytest.raises(FuselipError, match="exceeds 8"):
        model.encode_text(torch.full((1, 9), END_OF_TEXT))
    with pytest.raises(FuselipError, match="1 images but 2 texts"):
        model.encode_multimodal(pixels[:1], TEXT)
    with pytest.raises(FuselipError, match="no image tokens"):
        model.tokenize_image(pixels)


def test_wrong_configuration_is_told() -> None:
    with pytest.raises(FuselipError, match=r"'concat'.*add, magiclens"):
        LateFusionConfig(towers=towers(), fusion="concat")
    causal = towers()
    causal["text_cfg"]["no_causal_mask"] = False
    with pytest.raises(FuselipError, match="no_causal_mask"):
        LateFusionConfig(towers=causal)


@pytest.mark.parametrize("size", list(TOWERS))
def test_presets(size: str) -> None:
    config = LateFusionConfig.of_size(size, "magiclens", context_length=64)
    assert config.context_length == 64
    with torch.device("meta"):
        model = LateFusionModel(config)
    assert not any(buffer.is_meta for buffer in model.buffers())
