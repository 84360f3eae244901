"""Pairs of images and the names of their concepts."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_data import write_raw

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import DataError
from fuselip_core.data.prepare import prepare_data
from fuselip_core.data.prepared import PreparedData


def prepared(root: Path, folder: Path) -> PreparedData:
    settings = PrepareSettings(source="rocov2", root=root, workers=1, extra_pairs=("concepts",))
    prepare_data(settings, folder / "prepared", folder / "work")
    return PreparedData(folder / "prepared")


def test_each_image_leads_to_the_names_of_its_concepts(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=6, held_out=2)
    table = tmp_path / "raw" / "train_concepts.csv"
    first = table.read_text().splitlines()[1].split(",")[0]
    table.write_text(table.read_text().replace(f"{first},C0040405", f"{first},C0817096;C0040405;C0000001"))
    with (tmp_path / "raw" / "cui_mapping.csv").open("a") as mapping:
        mapping.write("C0817096,Chest\n")
    data = prepared(tmp_path / "raw", tmp_path)
    pairs = [row for row in data.pairs("train").to_pylist() if row["kind"] == "concepts"]
    texts = {row["query_image"]: row["target_text"] for row in pairs}
    assert len(texts) == 6 and texts.pop(first) == "Chest; X-Ray Computed Tomography"
    assert set(texts.values()) == {"X-Ray Computed Tomography"}
    assert all(row["query_text"] is None and row["group"] == row["query_image"] for row in pairs)
    assert "1 concepts of images have no name in cui_mapping.csv and are in no pair" in data.manifest["notes"]


def test_concepts_without_their_names_are_one_sentence(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=6, held_out=2)
    (tmp_path / "raw" / "cui_mapping.csv").unlink()
    with pytest.raises(DataError, match=r"has no cui_mapping\.csv with the names of concepts"):
        prepared(tmp_path / "raw", tmp_path)
