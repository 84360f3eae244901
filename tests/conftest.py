"""Fixtures that every test file may use."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prefect_stack import Served, serve
from repository_copy import (
    add_environment,
    bare_environment,
    copy_of,
    copy_repository,
    copy_with_stand_ins,
    dvc,
)
from training_data import small_settings, write_raw

from fuselip_core import stages
from fuselip_core.config import Settings
from fuselip_core.data.phantom.data_set import draw_data_set

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference values that lies beside a developer's checkout, not in a user's."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs ../shared (real data and reference values), which this checkout lacks")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with stand-ins for the stages and a little data; to be copied, not changed."""
    return copy_with_stand_ins(tmp_path_factory.mktemp("template") / "repository")


# `make demo` in seconds, with a model that becomes champion.
SMALL = {
    "prepare": {"root": "data"},
    "codebook": {"steps": 4, "batch_size": 16},
    "train": {"steps": 6, "batch_size": 16, "validate_every": 6, "checkpoint_every": 6},
    "evaluate": {"examples": 2},
    "register": {"gates": []},
}


@pytest.fixture(scope="session")
def demo_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with an environment of its own, a small sample and few steps."""
    folder = copy_repository(tmp_path_factory.mktemp("demo") / "repository")
    draw_data_set(folder / "data", 0, {"train": 64, "valid": 24, "test": 24})
    (folder / "data.dvc").unlink(missing_ok=True)
    dvc(folder, "add", "-q", "data")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, **SMALL}))
    add_environment(folder)
    return folder


@pytest.fixture(scope="session")
def demo(demo_checkout: Path) -> subprocess.CompletedProcess[str]:
    """`make demo` there, as it ended."""
    environment = bare_environment(demo_checkout.parent / "home")
    return subprocess.run(
        ["make", "demo"], cwd=demo_checkout, capture_output=True, text=True, env=environment, timeout=800
    )


@pytest.fixture(scope="session")
def prefect_served(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One `make serve-flows` for all tests, since it takes its time to start; it serves a copy with stand-ins."""
    served = serve(copy_of(template, tmp_path_factory.mktemp("served") / "repository"))
    try:
        yield served
    finally:
        assert served.stop() == 0, served.said()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a finished run of all stages on a small data set; to be read, not changed."""
    folder = tmp_path_factory.mktemp("run")
    write_raw(folder / "raw")
    settings = small_settings(folder / "raw", folder / "artifacts")
    (settings.artifacts / "checkpoints" / "interrupted-run").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        for stage in (stages.prepare, stages.codebook, stages.tokenize, stages.train, stages.evaluate, stages.register):
            stage(settings)
    return settings
