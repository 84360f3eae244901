"""The command line as a user sees it: what it prints and how it ends."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fuselip_core.cli import main as cli
from fuselip_core.config import STAGES, SettingsError
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.tracking import telemetry


@dataclass
class Done:
    """How a call of the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def fuselip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Calls the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSELIP_TRACKERS", "")

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["fuselip", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return call


def test_version_is_the_projects(fuselip: Callable[..., Done]) -> None:
    done = fuselip("--version")
    assert (done.code, done.out) == (0, f"fuselip {version('fuselip-rocov2')}\n")


def test_help_lists_every_stage_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['fuselip', '--help']\n"
        "from fuselip_core.cli.main import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(str(sorted({'torch', 'mlflow', 'transformers'} & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert all(stage in done.stdout for stage in STAGES)
    assert done.stderr == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--set", "train.stepz=1"], 2, "did you mean steps"),
        (["train", "--recipe", "nope"], 2, "unknown recipe 'nope'"),
        (["train", "--settings", "none.yaml"], 2, "no settings file at none.yaml"),
        (["prepare", "--set", "prepare.root=missing"], 1, "missing"),
        (["train", "--set", "train.steps=2001-99-99"], 2, "no valid YAML"),
    ],
)
def test_error_is_one_line(fuselip: Any, arguments: list[str], code: int, words: str) -> None:
    done = fuselip(*arguments)
    last = done.err.strip().splitlines()[-1]
    assert done.code == code
    assert last.startswith("error: ") and words in last
    assert "Traceback" not in done.err


def test_a_settings_file_in_another_encoding_is_one_line(fuselip: Any) -> None:
    Path("params.yaml").write_bytes("recipe: sämple".encode("latin-1"))
    done = fuselip("train")
    assert done.code == 2 and done.err.startswith("error: params.yaml is no valid YAML") and done.err.count("\n") == 1


def test_debug_raises_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fuselip", "train", "--set", "train.stepz=1", "--debug"])
    with pytest.raises(SettingsError):
        cli.main()


def test_unknown_verb_is_a_usage_error(fuselip: Any) -> None:
    done = fuselip("trane")
    assert done.code == 2 and "train" in done.err


def test_recipes_are_listed_shown_and_compared(fuselip: Any) -> None:
    assert "vqa-rad" in fuselip("recipes", "list").out.split()
    assert "Optimiser steps; or give epochs." in fuselip("recipes", "show", "sample").out
    assert "prepare.source: phantom → vqa-rad" in fuselip("recipes", "diff", "sample", "vqa-rad").out
    sizes = fuselip("recipes", "diff", "fuselip-rocov2", "fuselip-rocov2", "--size", "small", "--to-size", "base").out
    assert "model.size: small → base" in sizes and "train.init: chs20/FuseLIP-S-CC12M-MM → chs20/FuseLIP-B" in sizes


def test_sample_refuses_to_overwrite(fuselip: Any) -> None:
    Path("data").mkdir()
    done = fuselip("sample", "--out", "data")
    assert done.code == 1 and "exists already" in done.err


@pytest.fixture
def stage_that(monkeypatch: pytest.MonkeyPatch, fuselip: Any) -> Callable[[Callable[[Any], Any]], Done]:
    """Calls `fuselip train` with a stand-in for the stage."""

    def run(stage: Callable[[Any], Any]) -> Done:
        monkeypatch.setattr(cli, "stages", SimpleNamespace(train=stage))
        return fuselip("train")

    return run


def fail(error: BaseException) -> Callable[[Any], Any]:
    def stage(settings: Any) -> Any:
        raise error

    return stage


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FuselipError("no luck in here;\ntry there"), 1, "error: no luck in here; try there"),
        (Interrupted("stopped at step 3 and saved"), 75, "stopped at step 3"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x.bin"), 1, "no space is left on the disk at out/x.bin"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "permission denied at out"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
        (MemoryError(), 1, "error: out of memory (MemoryError); lower train.batch_size"),
        (
            IndexError("index out of\nrange"),
            1,
            "error: unexpected IndexError (index out of range); run again with --debug",
        ),
    ],
)
def test_errors_of_a_stage_become_sentences_and_codes(
    stage_that: Any, error: BaseException, code: int, words: str
) -> None:
    done = stage_that(fail(error))
    assert done.code == code
    assert words in done.err and "Traceback" not in done.err


def test_summary_is_printed_as_json(stage_that: Any) -> None:
    done = stage_that(lambda settings: {"steps": settings.train.steps, "folder": Path("a")})
    assert done.code == 0
    assert json.loads(done.out)["folder"] == "a"


def test_interrupt_from_the_keyboard_is_no_traceback(stage_that: Any) -> None:
    done = stage_that(fail(KeyboardInterrupt()))
    assert done.code in (1, 130) and "Traceback" not in done.err


def test_nothing_reports_home_unless_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow, DVC, wandb and the Hub's client read it when they are imported: commands set it before that."""
    for name in telemetry.OFF:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    code = (
        "import json, os, sys\n"
        "from fuselip_core.cli.main import main\n"
        "sys.argv = ['fuselip', 'recipes', 'list']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(dict(os.environ)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: found.get(name) for name in telemetry.OFF} == {**telemetry.OFF, "WANDB_ERROR_REPORTING": "true"}
