"""The tokenize stage's shards on two Dask workers: byte for byte the store of one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prefect.testing.utilities import prefect_test_harness
from training_data import write_raw

from flows.tokenize_map import tokenize_with
from fuselip_core import stages
from fuselip_core.config import Settings, load_settings
from fuselip_core.model.presets import tokenizer_config
from fuselip_core.model.titok import TiTok
from fuselip_core.tokenizer.tokenize import pending_shards, write_shard

SMALL_SHARDS = (
    "prepare.dev_share=0.0",
    "tokenize.rows_per_shard=5",
    "tokenize.batch_size=4",
    "tokenize.views=2",
    "prepare.workers=1",
)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Prepared data and an image tokenizer, before the tokenize stage."""
    place = tmp_path_factory.mktemp("tokenize")
    write_raw(place / "raw", train=24, held_out=8)
    overrides = [*SMALL_SHARDS, f"prepare.root={place / 'raw'}"]
    settings = load_settings(recipe="rocov2-tiny", overrides=overrides, artifacts=place / "artifacts")
    stages.prepare(settings)
    torch.manual_seed(0)
    tokenizer = TiTok(tokenizer_config("tiny"))
    (settings.artifacts / "codebook").mkdir()
    tokenizer.save(settings.artifacts / "codebook")
    return settings


@pytest.fixture
def alone(ready: Settings, tmp_path: Path) -> Path:
    """The store as one process writes it."""
    return store_of(ready, tmp_path / "alone")


@pytest.fixture
def together(ready: Settings, tmp_path: Path) -> Settings:
    """The same inputs once more."""
    shutil.copytree(ready.artifacts, tmp_path / "together")
    return ready.model_copy(update={"artifacts": tmp_path / "together"})


def test_shards_in_any_order_make_the_same_store(together: Settings, alone: Path) -> None:
    shards = pending_shards(together)
    assert len(shards) == sum(-(-count // 5) for count in (24, 8, 8))
    for shard in reversed(shards):
        write_shard(together, shard)
    assert pending_shards(together) == []
    stages.tokenize(together)
    assert same_files(together.artifacts / "tokens", alone)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_dask_workers_make_the_same_store(together: Settings, alone: Path, server: None) -> None:
    assert tokenize_with(together, workers=2) == 40
    stages.tokenize(together)
    assert same_files(together.artifacts / "tokens", alone)


@pytest.fixture
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=400):
        yield


def store_of(ready: Settings, folder: Path) -> Path:
    shutil.copytree(ready.artifacts, folder)
    stages.tokenize(ready.model_copy(update={"artifacts": folder}))
    return folder / "tokens"


def same_files(left: Path, right: Path) -> bool:
    """Whether two folders hold the same names and bytes."""
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (left, right)]
    files = [name for name in names[0] if (left / name).is_file()]
    return names[0] == names[1] and all((left / name).read_bytes() == (right / name).read_bytes() for name in files)
