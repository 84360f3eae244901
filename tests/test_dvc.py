"""What makes a stage run again, asked of DVC itself in a copy of this checkout whose stages are stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository_copy import copy_with_stand_ins, environment

from fuselip_core.config import STAGES


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_with_stand_ins(tmp_path_factory.mktemp("dvc") / "copy")
    assert reproduce(folder) == list(STAGES)
    assert reproduce(folder) == []
    return folder


def reproduce(folder: Path, *arguments: str) -> list[str]:
    """``dvc repro`` as a user types it; returns the stages that ran."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {**environment(), "PYTHONPATH": str(folder), "PATH": tools}
    command = [sys.executable, "-m", "dvc", "repro", "-q", *arguments]
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return calls.read_text().split() if calls.exists() else []


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_a_changed_default_runs_the_stages_that_read_it(checkout: Path) -> None:
    """No recipe states evaluate.examples: its value is the default in config.py. The model card states settings too."""
    edit(checkout / "fuselip_core" / "config.py", "examples: Int = Field(12,", "examples: Int = Field(13,")
    assert reproduce(checkout) == ["evaluate", "register"]


def test_a_changed_base_runs_the_stages_that_read_it(checkout: Path) -> None:
    edit(checkout / "fuselip_core" / "recipes" / "base.yaml", "learning_rate: 0.0005", "learning_rate: 0.0004")
    # The codebook is what it was before, so that only the card, which states the settings, is written again.
    assert reproduce(checkout) == ["codebook", "register"]


def test_what_changes_no_value_runs_nothing(checkout: Path) -> None:
    edit(checkout / "fuselip_core" / "config.py", 'description="Examples in the', 'description="Examples of the')
    edit(checkout / "fuselip_core" / "recipes" / "vqa-rad.yaml", "views: 12", "views: 11")
    with (checkout / "params.yaml").open("a", encoding="utf-8") as stream:
        stream.write("\n# A remark.\n")
    assert reproduce(checkout) == []


def test_an_edit_of_the_report_does_not_train_again(checkout: Path) -> None:
    page = checkout / "fuselip_core" / "evaluation" / "report" / "page.py"
    page.write_text(page.read_text(encoding="utf-8") + "\n# A remark.\n", encoding="utf-8")
    assert reproduce(checkout) == ["evaluate", "register"]  # whose model card speaks the report's words


def test_one_stage_by_hand_sees_changed_settings(checkout: Path) -> None:
    edit(checkout / "params.yaml", "train: {}", "train: {steps: 7}")
    assert reproduce(checkout, "train") == ["train"]
    assert (checkout / "artifacts" / "model" / "made").read_text() == "train 7"
