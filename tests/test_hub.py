"""Loading from folders in both formats and from the hub, and what is said when something does not fit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from torch import Tensor

from fuselip_core.errors import FuselipError, sentence_of
from fuselip_core.model import fuselip_config
from fuselip_core.model.fetch import fetch
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.hub import load_model, load_pretrained, load_tokenizer, save_model
from fuselip_core.model.late_fusion import LateFusionConfig, LateFusionModel
from fuselip_core.model.presets import open_clip_config
from fuselip_core.model.titok import TiTok, TiTokConfig

CODEBOOK = TiTokConfig(
    image_size=32, patch_size=16, latent_tokens=4, codebook_size=16, code_size=4, width=32, layers=1, heads=2
)
CONFIG = {
    "model_name": "fuse-clip-titok",
    "text_config": {
        "context_length": 16,
        "vocab_size": 49408 + 1 + 16,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "mlp_ratio": 4.0,
        "ls_init_value": None,
        "no_causal_mask": True,
        "pad_id": 0,
        "pool_type": "eot",
    },
    "mask_pad": True,
    "image_tokenizer": "someone/tokenizer",
    "use_eoi": False,
}
Change = Callable[[dict[str, Tensor]], Any]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkpoint in the published format."""
    monkeypatch.setitem(fuselip_config.PUBLISHED_TOKENIZERS, "someone/tokenizer", CODEBOOK)
    torch.manual_seed(0)
    model = FuseLIPModel(FuseLIPConfig.from_published(CONFIG))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def edit(folder: Path, change: Change) -> None:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def test_published_folder_gives_the_published_call(published: Path) -> None:
    stored = torch.load(published / "pytorch_model.bin", weights_only=True)
    model, _, text_tokenizer = load_model(published, device="cpu")
    assert not model.training
    assert sorted(model.state_dict()) == sorted(stored)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert model.mask_prediction_head.decoder.weight is model.token_embedding.weight
    assert model.encode_text(text_tokenizer(["an x-ray"])).shape == (1, 32)
    assert model.encode_image(torch.rand(1, 3, 32, 32)).shape == (1, 32)


def test_checkpoint_in_half_precision_is_loaded_as_float32(published: Path) -> None:
    edit(published, lambda state: state.update({name: value.half() for name, value in state.items()}))
    model, _ = load_pretrained(published, "cpu")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("ln_final.bias"), "missing: ln_final.bias"),
        (lambda state: state.update({"visual.proj": torch.zeros(2)}), "left over: visual.proj"),
        (
            lambda state: state.update({"ln_final.bias": torch.zeros(7)}),
            r"of another shape: ln_final.bias \[7\] instead of \[32\]",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if "resblocks" in name],
            "missing: transformer.resblocks.0.attn.in_proj_bias, .* and 8 more",
        ),
        (
            lambda state: state.update({"mask_prediction_head.decoder.weight": torch.zeros(49425, 32)}),
            "are one tensor in this model but differ",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(published: Path, change: Change, message: str) -> None:
    edit(published, change)
    with pytest.raises(FuselipError, match=message):
        load_model(published)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("", "model_name", "fuse-clip-other", "'fuse-clip-other', expected 'fuse-clip-titok'"),
        ("", "image_tokenizer", "someone/else", "unknown image tokenizer 'someone/else'"),
        ("text_config", "no_causal_mask", False, "no_causal_mask is False"),
        ("text_config", "vocab_size", 12, "vocab_size 12"),
        ("text_config", "width", 33, "width 33 is no multiple"),
        ("text_config", "width", None, "describes no model"),
    ],
)
def test_configuration_of_another_model_is_told(published: Path, part: str, key: str, value: Any, message: str) -> None:
    content = json.loads(json.dumps(CONFIG))
    (content[part] if part else content)[key] = value
    (published / "config.json").write_text(json.dumps(content))
    with pytest.raises(FuselipError, match=message):
        load_model(published)


def test_damaged_files_are_told(published: Path, tmp_path: Path) -> None:
    weights = published / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(FuselipError, match=r"pytorch_model\.bin is no readable checkpoint"):
        load_model(published)
    (published / "config.json").write_text("{")
    torch.save({}, weights)
    with pytest.raises(FuselipError, match=r"config\.json is no valid JSON"):
        load_model(published)
    (published / "config.json").unlink()
    with pytest.raises(FuselipError, match=r"holds no config\.json"):
        load_model(published)
    weights.unlink()
    with pytest.raises(FuselipError, match="holds no weights"):
        load_model(published)


def test_pickled_code_is_not_run(published: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (published / "harm",))

    torch.save({"ln_final.bias": Harmful()}, published / "pytorch_model.bin")
    with pytest.raises(FuselipError, match="no readable checkpoint"):
        load_model(published)
    assert not (published / "harm").exists()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("fusion", ["add", "magiclens"])
def test_late_fusion_as_published(tmp_path: Path, fusion: str, wrapped: bool) -> None:
    towers = open_clip_config("tiny")
    towers["vision_cfg"]["layers"] = towers["text_cfg"]["layers"] = 1
    model = LateFusionModel(LateFusionConfig(towers=towers, fusion=fusion, fusion_layers=2))
    content = {"model_cfg": towers, "preprocess_cfg": {}} if wrapped else towers
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    loaded, processor = load_pretrained(tmp_path, "cpu")
    assert loaded.config.fusion == fusion
    assert processor.normalise
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_saved_folder_is_whole_and_loads_again(published: Path, tmp_path: Path) -> None:
    model, _ = load_pretrained(published, "cpu")
    folder = tmp_path / "saved"
    save_model(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "processor_config.json",
    ]
    loaded, processor = load_pretrained(folder, "cpu")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert (processor.size, processor.context_length, processor.normalise) == (32, 16, False)


def test_failed_save_leaves_the_former_folder(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_pretrained(published, "cpu")
    folder = tmp_path / "saved"
    save_model(model, folder)
    before = (folder / "model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.GatedRepoError, "is gated"),
        (errors.RepositoryNotFoundError, "the hub has no model"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
    ],
)
def test_hub_failures_end_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        if issubclass(failure, errors.HfHubHTTPError):
            request = httpx.Request("GET", "http://hub.invalid")
            raise failure("long text", response=httpx.Response(401, request=request))
        raise failure("long text")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FuselipError, match=f"'owner/name'.*{message}|{message} 'owner/name'"):
        load_model("owner/name")


def test_hub_id_is_fetched(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(name: str, **_: Any) -> str:
        asked.append(name)
        return str(published)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    model, _, _ = load_model("chs20/FuseLIP-S-CC3M-MM", device="cpu")
    assert asked == 2 * ["chs20/FuseLIP-S-CC3M-MM"], "no safetensors, so the torch file is fetched as well"
    assert isinstance(model, FuseLIPModel)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_told(published: Path) -> None:
    with pytest.raises(FuselipError, match=r"no GPU 'cuda' .* give device='cpu'"):
        load_model(published, device="cuda")
    with pytest.raises(FuselipError, match="'gpu' is no device"):
        load_model(published, device="gpu")


@pytest.mark.parametrize(("key", "value"), [("width", -1), ("heads", 0), ("layers", "x"), ("image_tokenizer", 3)])
def test_a_configuration_that_describes_no_model_is_told(published: Path, tmp_path: Path, key: str, value: Any) -> None:
    model, _ = load_pretrained(published, "cpu")
    save_model(model, tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(FuselipError, match="describes no model"):
        load_model(tmp_path / "own", device="cpu")


def test_name_that_is_neither_folder_nor_hub_id() -> None:
    with pytest.raises(FuselipError, match="no folder '/nowhere/at/all'"):
        load_model("/nowhere/at/all")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, fuselip_core; assert 'load_model' in dir(fuselip_core); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokenizer_of_a_checkpoint_or_a_folder(published: Path, tmp_path: Path) -> None:
    stored = torch.load(published / "pytorch_model.bin", weights_only=True)
    tokenizer = load_tokenizer(published, decoder=True)
    for name, value in TiTok(CODEBOOK).state_dict().items():
        assert value.shape == tokenizer.state_dict()[name].shape
        assert torch.equal(tokenizer.state_dict()[name], stored[f"image_tokenizer.model.{name}"])
    assert tokenizer.decode(tokenizer.codes(torch.rand(1, 3, 32, 32))).shape == (1, 3, 32, 32)
    folder = tmp_path / "codebook"
    folder.mkdir()
    tokenizer.save(folder)
    again = load_tokenizer(folder, decoder=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("pixels", [True, False], ids=["pixel decoder", "decoder of another kind"])
def test_published_tokenizer(tmp_path: Path, pixels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiTokConfig, "from_published", classmethod(lambda cls, content: CODEBOOK))
    torch.manual_seed(0)
    source = TiTok(CODEBOOK, decoder=True)
    state = dict(source.state_dict())
    if not pixels:
        state["pixel_decoder.conv_in.weight"] = torch.zeros(3)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"vq_model": {}}}))
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load_tokenizer(tmp_path, decoder=True).state_dict()
    assert torch.equal(loaded["quantize.embedding.weight"], state["quantize.embedding.weight"])
    name = "decoder.decoder_embed.weight"
    assert torch.equal(loaded[name], state[name]) is pixels
    del state["latent_tokens"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(FuselipError, match="missing: latent_tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("section", [{}, {"vit_enc_model_size": "giant"}, 3])
def test_a_published_tokenizer_with_a_configuration_of_another_kind_is_told(tmp_path: Path, section: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": {"vq_model": section}}))
    torch.save(TiTok(CODEBOOK).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FuselipError, match="describes no TiTok"):
        load_tokenizer(tmp_path)


def test_late_fusion_checkpoint_has_no_tokenizer(tmp_path: Path) -> None:
    save_model(LateFusionModel(LateFusionConfig.of_size("tiny", "add")), tmp_path / "late")
    with pytest.raises(FuselipError, match="contains no image tokenizer"):
        load_tokenizer(tmp_path / "late")


def test_torch_files_are_fetched_only_where_there_are_no_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fetch("owner/name")
    assert asked == [["*.json", "*.safetensors"], ["*.bin"]]
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked.clear()
    fetch("owner/name")
    assert asked == [["*.json", "*.safetensors"]]


@pytest.mark.parametrize("name", ["a--b/c", "a/..", "a/b.git"])
def test_a_name_that_the_hub_does_not_allow_is_a_sentence(name: str) -> None:
    with pytest.raises(FuselipError, match="owner/name"):
        fetch(name)


def test_a_timeout_of_the_hub_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(name: str, allow_patterns: list[str]) -> str:
        raise httpx.ReadTimeout("slow")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", slow)
    with pytest.raises(FuselipError, match="the hub cannot be reached"):
        fetch("owner/name")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_or_forbidden_disk_is_not_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number), "/cache/blobs")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OSError) as caught:
        fetch("owner/name")
    assert "cannot be reached" not in str(caught.value)
    assert {errno.ENOSPC: "no space is left", errno.EACCES: "permission denied"}[number] in sentence_of(caught.value)
