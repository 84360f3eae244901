"""A training that was cut off goes on as if nothing had happened: loss after loss, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from training_data import small_settings, write_raw

from fuselip_core import stages
from fuselip_core.config import Settings
from fuselip_core.data.tokens.store import TokenStore
from fuselip_core.encoding.from_codes import TokenPairs
from fuselip_core.errors import FuselipError
from fuselip_core.model.fuselip import FuseLIPConfig, FuseLIPModel
from fuselip_core.model.titok import TiTok
from fuselip_core.training.checkpoint import Checkpoints, seed_everything
from fuselip_core.training.loop import Trainer


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a run that is tokenized and not yet trained."""
    folder = tmp_path_factory.mktemp("resume")
    write_raw(folder / "raw")
    settings = small_settings(folder / "raw", folder / "artifacts", checkpoint_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSELIP_TRACKERS", "")
        for stage in (stages.prepare, stages.codebook, stages.tokenize):
            stage(settings)
    return settings


def losses_of(tokens: Settings, folder: Path, stop_at: int | None = None) -> dict[int, float]:
    """Loss of every step that ran, until the loop raises before step `stop_at`."""
    store = TokenStore(tokens.artifacts / "tokens", "train")
    seed_everything(0)
    config = FuseLIPConfig.of_size("tiny", TiTok.load(tokens.artifacts / "codebook").config)
    encoder = TokenPairs(FuseLIPModel(config), store, tokens.train.mask_probability)
    trainer = Trainer(encoder, store, tokens.train, Checkpoints(folder), lambda metrics, step: None)
    losses, original = {}, trainer._train_step

    def step(number: int):
        if number == stop_at:
            raise KeyboardInterrupt
        metrics = original(number)
        losses[number] = float(metrics["loss"])
        return metrics

    trainer._train_step = step
    if stop_at is None:
        trainer.run()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_losses_equal_the_uninterrupted_ones(tokens: Settings, tmp_path: Path, optimizer: str) -> None:
    tokens = tokens.model_copy(update={"train": tokens.train.model_copy(update={"optimizer": optimizer})})
    whole = losses_of(tokens, tmp_path / "whole")
    assert sorted(whole) == list(range(12))
    for stop in random.Random(0).sample(range(1, 12), 3):
        before = losses_of(tokens, tmp_path / str(stop), stop_at=stop)
        after = losses_of(tokens, tmp_path / str(stop))
        assert min(after) == stop
        assert {**before, **after} == whole


def test_a_non_finite_loss_ends_the_run_before_the_step(tokens: Settings, tmp_path: Path) -> None:
    store = TokenStore(tokens.artifacts / "tokens", "train")
    model = FuseLIPModel(FuseLIPConfig.of_size("tiny", TiTok.load(tokens.artifacts / "codebook").config))
    with torch.no_grad():
        model.logit_bias.fill_(float("nan"))
    before = model.token_embedding.weight.clone()
    trainer = Trainer(TokenPairs(model, store, 0.1), store, tokens.train, Checkpoints(tmp_path), lambda *_: None)
    with pytest.raises(FuselipError, match=r"loss is nan at step 0 \(pairs ROCOv2_2023_train_0000\d\d/"):
        trainer.run()
    assert torch.equal(model.token_embedding.weight, before)


def start(tokens: Settings, artifacts: Path, steps: int, processes: int = 1) -> subprocess.Popen[str]:
    artifacts.mkdir(exist_ok=True)
    for name in ("prepared", "codebook", "tokens"):
        if not (artifacts / name).exists():
            (artifacts / name).symlink_to(tokens.artifacts / name)
    values = json.loads(tokens.model_dump_json(by_alias=True))
    values["artifacts"] = str(artifacts)
    values["train"] |= {"steps": steps, "checkpoint_every": 4}
    (artifacts / "params.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "fuselip_core", "train", "--settings", str(artifacts / "params.yaml")]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "FUSELIP_TRACKERS": ""}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_checkpoint(artifacts: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not list(artifacts.glob("checkpoints/*/step-*")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_process_goes_on_and_a_terminated_one_says_so(tokens: Settings, tmp_path: Path) -> None:
    """SIGKILL, then SIGTERM, then to the end: the curves are those of one uninterrupted run."""
    process = start(tokens, tmp_path / "cut", steps=24)
    wait_for_checkpoint(tmp_path / "cut", process)
    process.kill()
    process.wait()
    process = start(tokens, tmp_path / "cut", steps=24)
    time.sleep(0.2)
    wait_for_checkpoint(tmp_path / "cut", process)
    # A process that is still starting would be ended by the signal itself; it says when it goes on.
    assert process.stderr is not None
    while "resuming from step" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "the same command resumes it" in errors
    assert_equal_to_uninterrupted(tokens, tmp_path)


@pytest.mark.long  # six processes import all there is
def test_two_processes_under_torchrun_go_on_when_the_kernel_has_killed_one(tokens: Settings, tmp_path: Path) -> None:
    launcher = start(tokens, tmp_path / "cut", steps=24, processes=2)
    wait_for_checkpoint(tmp_path / "cut", launcher)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    launcher.communicate(timeout=120)
    assert launcher.returncode not in (0, None), "the other one does not train alone"
    assert_equal_to_uninterrupted(tokens, tmp_path, processes=2)


def assert_equal_to_uninterrupted(tokens: Settings, tmp_path: Path, processes: int = 1) -> None:
    """Lets the run in cut/ end, and one in whole/ that nobody touches: their curves are the same numbers."""
    for name in ("cut", "whole"):
        process = start(tokens, tmp_path / name, steps=24, processes=processes)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    histories = [
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("cut", "whole")
    ]
    for history in histories:
        for line in history:
            line.pop("pairs_per_second", None)
    assert histories[0] == histories[1]
