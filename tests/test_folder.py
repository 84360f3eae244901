"""One's own pictures: with a table of metadata, in folders named by class, or alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import DataError, Listing
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.sources.catalogue import list_source
from fuselip_core.errors import FuselipError

HEADER = ("file_name", "text", "split", "case", "question", "answer")
ROWS = [
    ("a/1.png", "nodule, left", "", "p1", "", ""),
    ("a/1.png", "another text", "", "p1", "Which side?", "Left"),
    ("a/1.png", "", "", "p1", "Is it large?", "No"),
    ("val/2.png", "a mass", "", "", "", ""),
    ("3.png", "a cyst", "Test", "p3", "", ""),
]
BAD = [
    ("gone.png", "x", "", "", "", ""),
    ("../up.png", "x", "", "", "", ""),
    ("", "x", "", "", "", ""),
    ("3.png", "x", "left", "", "", ""),
    ("3.png", "x", "train", "p3", "", ""),
    ("3.png", "", "test", "p3", "", ""),
    ("3.png", "", "test", "p3", "Where?", ""),
]
REASONS = ["missing_image", "outside_folder", "empty_path", "unknown_split", "contradiction"]
REASONS += ["empty_caption", "empty_answer", "missing_caption"]


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not read here")


def write_table(path: Path, kind: str) -> None:
    rows = [dict(zip(HEADER, row, strict=True)) for row in [*ROWS, *BAD]]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({key: value for key, value in row.items() if value}) for row in rows[:5]))
        with path.open("a") as stream:
            stream.writelines(f"\n{json.dumps(row)}" for row in rows[5:])
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, HEADER, delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def pairs_of(listing: Listing) -> list[tuple[str, str, str, str | None, str | None, str | None]]:
    return [
        (pair.pair_id, pair.split, pair.case, pair.query.text, pair.target.text, pair.answer_type)
        for pair in listing.pairs
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_metadata(tmp_path: Path, kind: str) -> None:
    write(tmp_path, "a/1.png", "val/2.png", "3.png", "4.JPG", ".hidden.png")
    write_table(tmp_path / f"metadata.{kind}", kind)
    listing = list_source("folder", tmp_path)
    assert pairs_of(listing) == [
        ("a/1.png/caption", "train", "p1", None, "nodule, left", None),
        ("a/1.png/caption-2", "train", "p1", None, "another text", None),
        ("a/1.png/question-1", "train", "p1", "Which side?", "left", "open"),
        ("a/1.png/question-2", "train", "p1", "Is it large?", "no", "closed"),
        ("val/2.png/caption", "valid", "val/2.png", None, "a mass", None),
        ("3.png/caption", "test", "p3", None, "a cyst", None),
    ]
    assert [(image.image_id, image.split) for image in listing.images] == [
        ("a/1.png", "train"),
        ("val/2.png", "valid"),
        ("3.png", "test"),
    ]
    assert [item.reason for item in listing.set_aside] == REASONS


def test_tables_in_the_folders_of_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path, f"{split}/images/1.png")
        (tmp_path / split / "metadata.csv").write_text(f"file_name,caption\nimages/1.png,of {split}\n")
    assert [row[:2] + row[4:5] for row in pairs_of(list_source("folder", tmp_path))] == [
        ("train/images/1.png/caption", "train", "of train"),
        ("validation/images/1.png/caption", "valid", "of validation"),
    ]


def test_folders_named_by_class(tmp_path: Path) -> None:
    kinds = ("glioma_tumor", "no_tumor")
    write(tmp_path, *(f"{split}/{kind}/{n}.png" for split in ("Training", "Testing") for kind in kinds for n in (1, 2)))
    listing = list_source("folder", tmp_path)
    assert {(pair.query.image, pair.split, pair.target.text) for pair in listing.pairs} == {
        (f"{split}/{kind}/{n}.png", name, kind.replace("_", " "))
        for split, name in (("Training", "train"), ("Testing", "test"))
        for kind in kinds
        for n in (1, 2)
    }
    asked = {item.query.image: item for item in listing.candidates}
    assert len(asked) == 4 and {item.split for item in asked.values()} == {"test"}
    for name, item in asked.items():
        assert (item.options[item.answer].text or "").replace(" ", "_") in str(name) and len(item.options) == 2
    wanted = "2 folders are used as classes (glioma_tumor, no_tumor); a metadata.csv would override them"
    assert listing.notes == [wanted]


@pytest.mark.parametrize("names", [("1.png", "x/2.png"), ("p1/1.png", "p2/2.png"), ("c/p1/1.png", "c/p1/2.png")])
def test_pictures_without_texts_are_an_archive(tmp_path: Path, names: tuple[str, ...]) -> None:
    write(tmp_path, *names)
    listing = list_source("folder", tmp_path)
    assert [image.image_id for image in listing.images] == sorted(names) and not listing.pairs
    assert listing.notes == ["there is no metadata and no class folder, so these pictures have no texts"]


def test_an_archive_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "raw" / f"{number}.png")
    settings = PrepareSettings.model_validate(
        {"source": "folder", "root": tmp_path / "raw", "workers": 1, "most_set_aside": 1}
    )
    manifest = prepare_data(settings, tmp_path / "out")
    assert manifest["counts"] == {"train": {"images": 3, "cases": 3, "pairs": {}}}
    prepared = PreparedData(tmp_path / "out")
    assert prepared.image_count("train") == 3 and prepared.pairs("train").num_rows == 0
    (tmp_path / "raw" / "metadata.csv").write_text("file_name,text\n0.png,n/a\n")
    with pytest.raises(FuselipError, match="no usable pair"):
        prepare_data(settings, tmp_path / "again")


def test_a_table_without_texts_and_a_folder_without_pictures(tmp_path: Path) -> None:
    write(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,x\n")
    with pytest.raises(DataError, match="no column text, caption or question"):
        list_source("folder", tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match="holds no pictures"):
        list_source("folder", tmp_path)
