"""The tokenize stage's shards on two Dask workers: byte for byte the store of one process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import Client
from prefect.testing.utilities import prefect_test_harness
from prefect_stack import free_port
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


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_killed_worker_of_a_cluster_loses_nothing(
    together: Settings, alone: Path, server: None, tmp_path: Path
) -> None:
    """Scheduler and workers are processes of their own, as on several machines with a shared folder."""
    with cluster(tmp_path) as (scheduler, workers):
        killed: list[str] = []

        def kill_one() -> None:
            with Client(scheduler) as client:
                client.wait_for_workers(2)
                while not killed and pending_shards(together):
                    busy = [name for name, tasks in client.processing().items() if tasks]
                    if len(pending_shards(together)) < 9 and busy:
                        address = busy[0]
                        (process,) = [each for each in workers if each.pid == client.run(os.getpid)[address]]
                        process.kill()
                        killed.append(address)
                    time.sleep(0.05)

        assassin = threading.Thread(target=kill_one)
        assassin.start()
        assert tokenize_with(together, workers=0, scheduler=scheduler) == 40
        assassin.join(60)
        assert len(killed) == 1 and [each.poll() for each in workers].count(-signal.SIGKILL) == 1
    stages.tokenize(together)
    assert same_files(together.artifacts / "tokens", alone)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """The address of a Dask scheduler, and its two workers."""
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def start(*words: str) -> subprocess.Popen[bytes]:
        with (folder / f"{words[0]}.log").open("ab") as log:
            command = [sys.executable, "-m", "dask", *words]
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    local = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
    scheduler = start("scheduler", "--port", address.rpartition(":")[2], *local)
    # Without a nanny, which would start another worker in place of a killed one.
    workers = [start("worker", address, "--no-nanny", "--nthreads", "1", *local) for _ in range(2)]
    try:
        yield address, workers
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()


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
