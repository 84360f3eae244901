"""Bulk embedding: every kind of input, bad rows, resuming after kill -9, memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_dicom import SECRETS, save, with_identities
from PIL import Image
from stand_in_embedder import WIDTH, StandIn
from training_data import small_settings, write_raw

from fuselip_core.config import Settings
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.errors import FuselipError
from fuselip_core.search import embed
from fuselip_core.search.inputs import Archive, kind_of

PROGRAM = [sys.executable, str(Path(__file__).with_name("stand_in_embedder.py"))]


def draw(path: Path, seed: int, size: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(grey).save(path)
    return path


def embedded(source: Path, out: Path, **options: Any) -> tuple[list[dict[str, Any]], embed.Outcome]:
    outcome = embed.embed_archive(source, out, StandIn(), **options)  # type: ignore[arg-type]
    return pq.read_table(out).to_pylist(), outcome


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for number in range(5):
        draw(tmp_path / "in" / "deep" / f"{number}.png", number)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture at all")
    rows, outcome = embedded(tmp_path / "in", tmp_path / "out.parquet", batch_size=2)
    assert [row["image"] for row in rows] == [f"deep/{number}.png" for number in range(5)]
    assert [row["id"] for row in rows] == [f"in/deep/{number}.png" for number in range(5)]
    assert outcome.set_aside == {"not_an_image": 1}
    alone = StandIn().embed([Image.open(tmp_path / "in" / "deep" / "3.png")], [None])[0]
    assert np.allclose(rows[3]["embedding"], alone)
    aside = [json.loads(line) for line in (tmp_path / "out.parquet.set_aside.jsonl").read_text().splitlines()]
    assert [item["id"] for item in aside] == ["in/broken.png"]
    assert {path.name for path in tmp_path.iterdir()} >= {"out.parquet", "out.parquet.set_aside.jsonl"}
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_images_texts_and_both(tmp_path: Path, suffix: str) -> None:
    draw(tmp_path / "scan.png", 1)
    rows: list[dict[str, Any]] = [
        {"image": "scan.png", "text": None},
        {"image": None, "text": "chest radiograph"},
        {"image": "scan.png", "text": "is there a lesion?"},
        {"image": None, "text": None},
        {"image": "absent.png", "text": "no picture"},
    ]
    path = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        lines = [",".join(f'"{value or ""}"' for value in row.values()) for row in rows]
        path.write_text("image,text\n" + "\n".join(lines) + "\n")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found, outcome = embedded(path, tmp_path / "out.parquet")
    assert [(row["id"], row["image"], row["text"]) for row in found] == [
        ("table/1", "scan.png", None),
        ("table/2", None, "chest radiograph"),
        ("table/3", "scan.png", "is there a lesion?"),
    ]
    assert outcome.set_aside == {"empty_row": 1, "missing_image": 1}
    both = StandIn().embed([Image.open(tmp_path / "scan.png")], ["is there a lesion?"])[0]
    assert np.allclose(found[2]["embedding"], both)


def test_pictures_within_a_parquet_file(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (9, 9), 90).save(stream, "PNG")
    image = {"bytes": stream.getvalue(), "path": "a.png"}
    pq.write_table(pa.Table.from_pylist([{"id": "x", "image": image}]), tmp_path / "hub.parquet")
    rows, _ = embedded(tmp_path / "hub.parquet", tmp_path / "out.parquet")
    assert rows[0]["id"] == "x" and len(rows[0]["embedding"]) == WIDTH


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "rocov2"
    write_raw(folder, train=10, held_out=4)
    return folder


def test_prepared_and_published_data(raw: Path, tmp_path: Path) -> None:
    prepare_data(small_settings(raw, tmp_path / "artifacts").prepare, tmp_path / "prepared")
    assert (kind_of(raw), kind_of(tmp_path / "prepared")) == ("rocov2", "prepared")
    published, prepared = (list(Archive(folder).rows(pytest.fail)) for folder in (raw, tmp_path / "prepared"))
    assert len(published) == len(prepared) == 18
    published, prepared = (sorted(rows, key=lambda row: row.id) for rows in (published, prepared))
    for one, other in zip(published, prepared, strict=True):
        same = ("id", "caption", "concepts", "modality", "case", "split", "place")
        assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
    assert published[0].caption.endswith("half is bright, seen in 001.")
    assert published[0].concepts == ("X-Ray Computed Tomography",)
    assert Archive(tmp_path / "prepared").total == 18


def test_a_tree_of_dicom_files_keeps_identities_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELIP_PSEUDONYM_KEY", "k" * 32)
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 16
    archive = tmp_path / "Mustermann Erika"
    save(with_identities(values), archive / "IM1.dcm")
    save(with_identities(values[::-1].copy(), BurnedInAnnotation="YES"), archive / "IM2.dcm")
    without = with_identities(values)
    for name in ("Rows", "Columns", "PixelData"):
        delattr(without, name)
    save(without, archive / "IM3.dcm")
    draw(archive / "icon.png", 1)
    assert kind_of(archive) == "dicom"
    rows, outcome = embedded(archive, tmp_path / "out.parquet")
    assert len(rows) == 1 and rows[0]["id"].startswith("image-")
    assert outcome.set_aside == {"burned_in_text": 1, "no_pixels": 1, "not_dicom": 1}
    written = b"".join(path.read_bytes() for path in tmp_path.glob("out.parquet*"))
    for secret in (*SECRETS.values(), "Mustermann", "IM1"):
        assert secret.encode() not in written


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ({}, "holds no pictures"),
        ({"notes.txt": b"nothing"}, "holds no pictures"),
        ({"table.xls": b"nothing"}, "neither a folder nor a table"),
        ({"table.csv": b"picture\nscan.png\n"}, "no column image, file_name or text"),
        ({"table.csv": b"image\nabsent.png\n"}, "has no row that can be embedded"),
    ],
)
def test_inputs_that_cannot_be_used(tmp_path: Path, content: dict[str, bytes] | None, said: str) -> None:
    source = tmp_path / "in"
    if content is not None:
        source.mkdir()
        for name, data in content.items():
            (source / name).write_bytes(data)
            source = source / name if name.startswith("table") else source
    with pytest.raises(FuselipError, match=said):
        embedded(source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_a_picture_of_200_megapixels_is_set_aside(tmp_path: Path) -> None:
    draw(tmp_path / "in" / "good.png", 1)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "in" / "huge.png")
    rows, outcome = embedded(tmp_path / "in", tmp_path / "out.parquet")
    assert len(rows) == 1 and outcome.set_aside == {"too_large": 1}


def test_killed_and_started_again_it_gives_the_same_file(tmp_path: Path) -> None:
    for number in range(40):
        draw(tmp_path / "in" / f"{number:02}.png", number)
    (tmp_path / "in" / "05.png").write_bytes(b"broken")
    (tmp_path / "in" / "39.png").write_bytes(b"broken")
    whole, outcome = embedded(tmp_path / "in", tmp_path / "whole.parquet", batch_size=4)
    work, kept = tmp_path / ".out.parquet.parts", 0
    for _ in range(2):
        child = subprocess.Popen([*PROGRAM, "embed", str(tmp_path / "in"), str(tmp_path / "out.parquet"), "0.5"])
        deadline = time.monotonic() + 240
        while len(list(work.glob("part-*.parquet"))) < kept + 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        child.kill()
        child.wait()
        kept = len(list(work.glob("part-*.parquet")))
        assert not (tmp_path / "out.parquet").exists()
    assert kept >= 4
    first = (work / "part-000000.parquet").stat().st_mtime_ns
    embedder: Any = StandIn()
    seen: list[int] = []
    embedder.embed = lambda images, texts, batch_size: (seen.append(len(images)), StandIn().embed(images, texts))[1]
    again = embed.embed_archive(tmp_path / "in", tmp_path / "out.parquet", embedder, batch_size=4)
    assert first and sum(seen) <= 38 - 4 * kept + 2
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == whole
    assert again == outcome and again.set_aside == {"not_an_image": 2}


def test_an_archive_that_changed_meanwhile_is_embedded_anew(tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / "in" / f"{number}.png", number)
    work = tmp_path / ".out.parquet.parts"
    archive, embedder = Archive(tmp_path / "in"), StandIn()
    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), WIDTH))])

    def records(items: Any) -> list[dict[str, Any]]:
        return [{"id": item.row.id, "embedding": item.vector} for item in items]

    embed.Parts(work, schema, records).write(archive, embedder, 2, lambda row, stamp: None)  # type: ignore[arg-type]
    draw(tmp_path / "in" / "1.png", 99)
    parts = embed.Parts(work, schema, records)
    parts.write(Archive(tmp_path / "in"), embedder, 2, lambda row, stamp: None)  # type: ignore[arg-type]
    rows = [row for batch in parts.batches() for row in batch.to_pylist()]
    expected = embedder.embed([Image.open(tmp_path / "in" / f"{number}.png") for number in range(4)], [None] * 4)
    assert len(rows) == 4 and np.allclose([row["embedding"] for row in rows], expected)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    for number in range(30):
        draw(tmp_path / "in" / f"{number}.png", number)
    child = subprocess.Popen([*PROGRAM, "embed", str(tmp_path / "in"), str(tmp_path / "out.parquet"), "0.5"])
    try:
        while not (tmp_path / ".out.parquet.parts" / "key.json").exists():
            time.sleep(0.05)
        with pytest.raises(FuselipError, match="another process is embedding into"):
            embedded(tmp_path / "in", tmp_path / "out.parquet")
    finally:
        child.kill()
        child.wait()
    embedded(tmp_path / "in", tmp_path / "out.parquet")
    assert not list(tmp_path.glob(".*")), "neither parts nor a lock file stay beside the vectors"


def test_memory_does_not_grow_with_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PART_ROWS", 64)

    def peak(count: int) -> int:
        pq.write_table(pa.table({"text": [f"{number} {'x' * 500}" for number in range(count)]}), tmp_path / "t.parquet")
        tracemalloc.start()
        embed.embed_archive(tmp_path / "t.parquet", tmp_path / "out.parquet", StandIn(), 32)  # type: ignore[arg-type]
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(256)  # what is loaded once
    assert peak(4096) < 2 * peak(512)


def test_the_verb_and_the_embedder_agree(finished_run: Settings, tmp_path: Path) -> None:
    """A decoded picture that went through the threads has the vector of the file itself; both kinds of rows."""
    from typer.testing import CliRunner

    from fuselip_core import Embedder
    from fuselip_core.cli.main import app

    draw(tmp_path / "scan.png", 3, size=70)
    (tmp_path / "table.csv").write_text("image,text\nscan.png,\nscan.png,which half is bright?\n,a bright half\n")
    model = finished_run.artifacts / "model"
    words = ["embed", str(tmp_path / "table.csv"), "-o", str(tmp_path / "out.parquet"), "--model", str(model)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "3 rows embedded" in done.output
    embedder = Embedder.from_pretrained(model)
    scan = tmp_path / "scan.png"
    inputs = [Image.open(scan), {"image": scan, "text": "which half is bright?"}, "a bright half"]
    vectors = embedder.encode(inputs)
    assert np.allclose(pq.read_table(tmp_path / "out.parquet")["embedding"].to_pylist(), vectors, atol=1e-6)
    assert np.allclose(embedder.encode("a bright half"), vectors[2], atol=1e-6)
    assert np.allclose(np.diag(embedder.similarity(vectors, vectors)), 1.0, atol=1e-5)
    assert embedder.digest == Embedder.from_pretrained(model).digest and len(embedder.digest) == 64
    embedder.model.logit_scale.data += 1
    del embedder.digest
    assert embedder.digest != Embedder.from_pretrained(model).digest
