"""What needs a GPU, skipped elsewhere; on the CPU the same checks run where they don't compile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
from gpu_checks import CHECKS, compiled_equals_eager, published_values_are_reproduced  # noqa: E402

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@needs_cuda
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_gpu(check: Any, tmp_path: Path) -> None:
    check(torch.device("cuda"), tmp_path)


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check is not compiled_equals_eager], ids=lambda check: check.__name__
)
def test_the_checks_themselves_hold_on_a_cpu(check: Any, tmp_path: Path) -> None:
    if check is published_values_are_reproduced and not reference.keys():
        pytest.skip("needs ../shared/fixtures, which this checkout lacks")
    check(torch.device("cpu"), tmp_path)


@needs_cuda
def test_memory_of_a_step_is_near_its_estimate() -> None:
    from train import memory

    from fuselip_core.config import TrainSettings
    from fuselip_core.model.fuselip_config import FuseLIPConfig
    from fuselip_core.training.memory import step_memory

    estimated = step_memory(FuseLIPConfig.of_size("small"), TrainSettings(batch_size=64), 64, 1, "cuda").total / 1e6
    assert memory("ours", "small", 64)["peak_memory_mb"] == pytest.approx(estimated, rel=0.3)


@pytest.mark.long  # every part at size tiny, one of which compiles
def test_the_script_for_a_bare_machine_runs_every_part() -> None:
    done = subprocess.run(
        [BENCHMARKS / "gpu.sh", "--dry"],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"machine", "checks", "train", "busy", "tokenize", "codebook", "evaluate"}
    assert not [part for part, found in result.items() if "failed" in found], done.stderr[-3000:]
