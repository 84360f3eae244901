"""Runs kept in an object store (FUSELIP_STORE): what a machine that is gone had made, another one goes on from."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect_stack import wait_until
from repository_copy import copy_of, dvc, environment
from stack import Stack, s3_store

from flows.run.folder import Run
from flows.run.runner import Outcome
from flows.run.store import KeptRunner, _Sent, fetch_run
from fuselip_core.config import load_settings
from fuselip_core.errors import FuselipError

NAME = "pod"
TICKS = f"runs/{NAME}/artifacts/checkpoints/ticks"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the environment of a pod says about a store."""
    with s3_store(tmp_path_factory.mktemp("store")) as running:
        yield {**keys(running), "FUSELIP_STORE": "s3://dvc/fuselip"}


def keys(running: Stack) -> dict[str, str]:
    stated = {name: value for name, value in running.environment("buckets").items() if name.startswith("AWS_")}
    return {**stated, "AWS_ENDPOINT_URL_S3": running.store}


@pytest.fixture
def origin(template: Path, tmp_path: Path, store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository that pods clone: a data set of which only the version is committed, and stand-ins for stages."""
    folder = copy_of(template, tmp_path / "origin")
    stages = folder / "fuselip_core" / "stages.py"
    stages.write_text(
        stages.read_text()
        .replace('"ticks"', f'"{TICKS}"')
        .replace(
            "def note(name, line):\n",
            "def note(name, line):\n    Path(name).parent.mkdir(parents=True, exist_ok=True)\n",
        )
    )
    (folder / "Pictures_data").mkdir()
    (folder / "Pictures_data" / "picture.txt").write_text("a picture")
    dvc(folder, "add", "-q", "Pictures_data")
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    dvc(folder, "remote", "add", "-q", "kept", f"{store['FUSELIP_STORE']}/dvc")
    dvc(folder, "push", "-q", "-r", "kept", "Pictures_data.dvc")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for words in (["add", "-A"], ["commit", "-q", "-m", "data"]):
        subprocess.run(["git", *identity, *words], cwd=folder, check=True)
    return folder


class Pod:
    """A fresh clone, with nothing in it but what git has."""

    def __init__(self, origin: Path, folder: Path, store: dict[str, str]) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "-q", str(origin), str(folder)], check=True)
        self.around = {**environment(), **store, "DVC_SITE_CACHE_DIR": str(folder / ".dvc" / "site")}

    def start(self, order: str) -> subprocess.Popen[str]:
        (self.folder / "order").write_text(order)
        words = ["--source", "rocov2", "--root", "Pictures_data", "--name", NAME]
        command = [sys.executable, "-m", "flows.pipeline", *words]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.around, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def steps(self) -> list[int]:
        ticks = self.folder / TICKS
        return [int(tick.split(":")[0]) for tick in ticks.read_text().split()] if ticks.exists() else []


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_another_pod_goes_on_where_a_lost_one_was(origin: Path, tmp_path: Path, store: dict[str, str]) -> None:
    first = Pod(origin, tmp_path / "first", store)
    run = first.start("train slow 10000")
    wait_until(lambda: len(first.steps()) > 5 or run.poll() is not None, "the training")
    assert run.poll() is None, run.stdout and run.stdout.read()
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 128 + signal.SIGTERM, said
    assert (first.folder / "calls").read_text().split() == ["prepare", "codebook", "tokenize", "train"]
    done = first.steps()
    subprocess.run(["rm", "-rf", str(first.folder)], check=True)

    second = Pod(origin, tmp_path / "second", store)
    run = second.start(f"train slow {len(done) + 4}")
    said = run.communicate(timeout=600)[0]
    assert run.returncode == 0, said
    assert (second.folder / "calls").read_text().split() == ["train", "evaluate", "register"], "a stage was repeated"
    assert second.steps() == list(range(len(done) + 4))


@pytest.fixture
def run(template: Path, tmp_path: Path, store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Run:
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    repository = copy_of(template, tmp_path / "repository")
    folder = repository / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text((repository / "params.yaml").read_text())
    return Run(repository, folder, load_settings(recipe="sample", overrides=["artifacts=runs/small/artifacts"]))


def listed(store: dict[str, str]) -> set[str]:
    """The run's files that the store has."""
    from fsspec.core import url_to_fs

    files, folder = url_to_fs(f"{store['FUSELIP_STORE']}/runs/small", use_listings_cache=False)
    return {place.removeprefix(f"{folder}/") for place in files.find(folder)}


def test_checkpoints_are_sent_and_outputs_left_to_dvc(run: Run, store: dict[str, str]) -> None:
    for name in ("checkpoints/a/step-2/state.pt", "metrics.json", "prepared/shard", "model/weights"):
        path = run.folder / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (run.folder / "dvc.yaml").write_text((run.repository / "dvc.yaml").read_text())
    sent = _Sent(store["FUSELIP_STORE"], run)
    sent.send()
    first = "artifacts/checkpoints/a/step-2/state.pt"
    assert listed(store) == {"params.yaml", "dvc.yaml", "artifacts/metrics.json", first}
    (run.folder / first).parent.rename((run.folder / first).parent.with_name("step-4"))
    sent.send()
    assert first.replace("step-2", "step-4") in listed(store) and first not in listed(store), "the store only grows"
    (run.folder / "artifacts" / "metrics.json").unlink()
    (run.folder / "params.yaml").write_text("mine")
    fetch_run(run, print)
    assert (run.folder / "artifacts" / "metrics.json").read_text() == "metrics.json"
    assert (run.folder / "params.yaml").read_text() == "mine", "what is here was overwritten"


def test_a_store_that_ends_during_a_stage_costs_no_work(
    run: Run, store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.folder / "dvc.yaml").write_text((run.repository / "dvc.yaml").read_text())
    monkeypatch.setattr("flows.run.store.EVERY_SECONDS", 0.05)
    lines: list[str] = []

    def broken(self: _Sent) -> None:
        if "over" not in lines:
            raise FuselipError("FUSELIP_STORE=s3://dvc/fuselip: it is away")

    class Stage:
        def run(self, stage: str, run: Run, on_line: Any, force: bool = False) -> Outcome:
            wait_until(lambda: lines, "a look at the store", seconds=60)
            lines.append("over")
            return Outcome(stage, "unchanged", 0.0, "nothing has changed")

    monkeypatch.setattr(_Sent, "send", broken)
    assert KeptRunner(Stage(), store["FUSELIP_STORE"]).run("train", run, lines.append).status == "unchanged"
    assert lines[0] == "warning: FUSELIP_STORE=s3://dvc/fuselip: it is away"
    # At a stage's end it does cost: what is here alone would go with the machine.
    lines.remove("over")
    monkeypatch.setattr(Stage, "run", lambda self, stage, *_: Outcome(stage, "unchanged", 0.0, ""))
    outcome = KeptRunner(Stage(), store["FUSELIP_STORE"]).run("train", run, lines.append)
    assert (outcome.status, outcome.message) == ("failed", "FUSELIP_STORE=s3://dvc/fuselip: it is away")


def test_a_store_that_cannot_be_read_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELIP_STORE", "s3://no-such-bucket/fuselip")
    with pytest.raises(FuselipError, match=r"FUSELIP_STORE=s3://no-such-bucket/fuselip: .*bucket"):
        fetch_run(run, print)
    root = Run(run.repository, run.repository, run.settings)
    with pytest.raises(FuselipError, match="needs a name"):
        fetch_run(root, print)
