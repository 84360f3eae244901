"""The cases of ../shared/cases, each through the command that its README names and held to the value it states.

Other tests hold the same values with input that they make; these are the files that the faults were found with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from typer.testing import CliRunner

from fuselip_core.cli.main import app
from fuselip_core.data.dicom.pixels import render


@pytest.fixture
def cases(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSELIP_PSEUDONYM_KEY", "k" * 40)
    return shared / "cases"


def prepare(source: str, root: Path, out: Path, *more: str) -> dict[str, Any]:
    words = ["data", "prepare", "--source", source, "--root", str(root), "--out", str(out), "--set", "most_set_aside=1"]
    done = CliRunner().invoke(app, [*words, "--set", "workers=1", *more])
    assert done.exit_code == 0, done.exception
    return dict(json.loads(done.stdout))


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(f"{kind}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_caption_of_143_000_characters_is_used(cases: Path, tmp_path: Path) -> None:
    found = prepare("rocov2", cases / "csv_long_field", tmp_path / "out")
    captions = [row["target_text"] for row in rows(tmp_path / "out", "pairs")]
    assert max(map(len, captions)) > 131_072 and len(captions) == 12 and not found["quarantine"]


def test_an_unquoted_comma_cuts_no_caption(cases: Path, tmp_path: Path) -> None:
    found = prepare("rocov2", cases / "csv_extra_comma", tmp_path / "out")
    assert found["quarantine"]["bad_row"] == 1
    assert "nodule" not in [row["target_text"] for row in rows(tmp_path / "out", "pairs")]
    aside = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    (detail,) = [row["detail"] for row in aside if row["reason"] == "bad_row"]
    assert "2" in detail, "the line's number"


def test_keys_of_two_tars_lead_to_two_pictures(cases: Path, tmp_path: Path) -> None:
    prepare("cc3m", cases / "tar_same_name" / "twofolders", tmp_path / "two")
    pairs = [row for row in rows(tmp_path / "two", "pairs") if row["split"] == "train"]
    assert len({row["query_image"] for row in pairs}) == len({row["target_text"] for row in pairs}) == len(pairs) == 2
    prepare("cc3m", cases / "tar_same_name" / "img2dataset", tmp_path / "folders")
    assert {row["split"] for row in rows(tmp_path / "folders", "images")} == {"train", "valid"}
    assert prepare("cc3m", cases / "tar_same_name" / "same2", tmp_path / "same")["quarantine"] == {"repeated_id": 1}


def test_linked_folders_are_read(cases: Path, tmp_path: Path) -> None:
    shutil.copytree(cases / "symlinked_folders", tmp_path / "scans")
    link = tmp_path / "scans" / "root" / "linked"
    link.unlink()  # a plain file where the copy of ../shared knows no links
    link.symlink_to("../far")
    prepare("dicom", tmp_path / "scans" / "root", tmp_path / "out")
    assert len(rows(tmp_path / "out", "images")) == 6


def test_roco_version_1_is_joined_through_its_tables(cases: Path, tmp_path: Path) -> None:
    prepare("rocov2", cases / "roco_v1", tmp_path / "out", "--set", "shared_images=keep")
    assert len(rows(tmp_path / "out", "pairs")) >= 9


def grey(path: Path) -> np.ndarray:
    return render(pydicom.dcmread(path), 0, None, max_megapixels=10)


def test_one_stored_value_is_one_grey_in_all_slices(cases: Path) -> None:
    first, second = (grey(cases / "dicom_window_below_1" / f"slice{number}.dcm") for number in (1, 2))
    assert first.ravel()[2] == second.ravel()[5] == 68


def test_tables_of_big_endian_files(cases: Path) -> None:
    folder = cases / "dicom_big_endian_tables"
    assert np.array_equal(grey(folder / "palbe.dcm"), grey(folder / "palette_LE.dcm"))
    assert grey(folder / "be3.dcm")[0].tolist() == [0, 39, 78, 146, 195, 255]
