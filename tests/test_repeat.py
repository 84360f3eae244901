"""The script that repeats published results: what holds, what does not, and what stands in its table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECIPE = {"about": "a test", "recipe": "sample", "settings": [], "seeds": [0, 1]}


def repeat(folder: Path, published: dict[str, list[float]], *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of the script whose table has one row, on seeds that have been measured already."""
    for name in ("repeat.py", "measure.py"):
        (folder / name).write_text((BENCHMARKS / name).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "results.yaml").write_text(yaml.safe_dump({"row": {**RECIPE, "metrics": published}}), encoding="utf-8")
    for seed, value in ((0, 0.5), (1, 0.7)):
        place = folder / "runs" / "row" / f"seed-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "metrics.json").write_text(f'{{"accuracy": {value}, "other": 1.0}}', encoding="utf-8")
    command = [sys.executable, "repeat.py", *words, "--folder", str(folder / "runs")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, timeout=120)


@pytest.mark.parametrize(("mean", "spread", "holds"), [(0.65, 0.03, True), (0.7, 0.03, False), (0.6, 0.0, True)])
def test_a_mean_within_two_deviations_holds(tmp_path: Path, mean: float, spread: float, holds: bool) -> None:
    done = repeat(tmp_path, {"accuracy": [mean, spread]}, "row")
    assert done.returncode == (0 if holds else 1), done.stderr
    word = "holds" if holds else "DOES NOT HOLD"
    assert done.stdout.strip() == f"{word}: accuracy 0.6000, published {mean:.4f} ± {spread:.4f}"


def test_a_single_seed_is_compared_and_a_record_is_written(tmp_path: Path) -> None:
    assert repeat(tmp_path, {"accuracy": [0.65, 0.03]}, "row", "--seeds", "0").returncode == 1
    assert repeat(tmp_path, {"accuracy": [0.0, 0.0]}, "row", "--record").returncode == 0
    written = yaml.safe_load((tmp_path / "results.yaml").read_text(encoding="utf-8"))
    assert written["row"]["metrics"] == {"accuracy": [0.6, 0.1414]} and written["row"]["seeds"] == [0, 1]


def test_an_unknown_row_names_those_there_are(tmp_path: Path) -> None:
    done = repeat(tmp_path, {"accuracy": [0.6, 0.1]}, "medpix")
    assert done.returncode == 1 and "row: a test" in done.stdout and "there is no row medpix" in done.stderr


def test_published_rows_are_of_recipes_that_exist_and_have_a_spread() -> None:
    from fuselip_core.config import load_settings

    rows = yaml.safe_load((BENCHMARKS / "results.yaml").read_text(encoding="utf-8"))
    for row in rows.values():
        overrides = [setting.format(shared="/data") for setting in row["settings"]]
        load_settings(None, overrides, recipe=row["recipe"])
        assert len(row["seeds"]) >= 3
        assert all(len(numbers) == 2 and numbers[1] >= 0 for numbers in row["metrics"].values())
        assert all(mean for mean, _ in row["metrics"].values()), "not measured yet"
