"""Prepared data as tasks of MTEB, measured with MTEB itself: its numbers are those of our own evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_comparison import CPU, evaluate, open_clip_folder
from training_data import write_raw

from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.errors import FuselipError
from fuselip_core.model.comparison import load_comparison

mteb = pytest.importorskip("mteb", reason="needs the extra mteb")
from fuselip_core.evaluation.mteb_tasks import MtebModel, tasks_of  # noqa: E402


def measured(model: MtebModel, tasks: list) -> dict[str, dict[str, float]]:
    results = mteb.evaluate(model, tasks, cache=None, raise_error=True)
    return {result.task_name: result.scores["test"][0] for result in results}


def test_mteb_finds_what_evaluate_finds(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=16, held_out=24)
    name = open_clip_folder(tmp_path / "clip", tokens=32)  # whole captions: evaluate counts those cut alike as equal
    done = evaluate(tmp_path / "raw", tmp_path / "artifacts", name)
    assert done.exit_code == 0, done.exception
    ours = json.loads((tmp_path / "artifacts/comparison/results.json").read_text())["models"][name]
    prepared = PreparedData(tmp_path / "artifacts/prepared")
    scores = measured(MtebModel(load_comparison(name, CPU)), tasks_of(prepared, "test", "Small"))
    directions = {"SmallI2TRetrieval": "image_to_text", "SmallT2IRetrieval": "text_to_image"}
    for task, direction in directions.items():
        for k in (1, 5, 10):
            expected = ours[f"retrieval/{direction}/recall_at_{k}"]
            assert scores[task][f"hit_rate_at_{k}"] == pytest.approx(expected, abs=1e-4), (task, k)
    assert scores["SmallIT2TRetrieval"]["hit_rate_at_1"] == pytest.approx(ours["answers/fused/accuracy"], abs=1e-4)
    assert 0 < scores["SmallI2TRetrieval"]["main_score"] < 1


def test_a_split_without_questions_has_two_tasks(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=8, held_out=4)
    for split in ("train", "valid", "test"):
        (tmp_path / "raw" / f"{split}_questions.csv").unlink()
    evaluate(tmp_path / "raw", tmp_path / "artifacts", open_clip_folder(tmp_path / "clip"))
    prepared = PreparedData(tmp_path / "artifacts/prepared")
    assert [task.metadata.category for task in tasks_of(prepared, "test")] == ["i2t", "t2i"]
    with pytest.raises(FuselipError, match="no split 'dev'"):
        tasks_of(prepared, "dev")
