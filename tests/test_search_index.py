"""The index: search, filters, folding, adding, removing for good, kills, full disks, the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_dicom import SECRETS, save, with_identities
from PIL import Image
from stand_in_embedder import WIDTH, StandIn
from typer.testing import CliRunner

from fuselip_core.cli.main import app
from fuselip_core.config import Settings
from fuselip_core.data.places import Place
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.errors import FuselipError, sentence_of
from fuselip_core.files import sha256_of
from fuselip_core.search import build
from fuselip_core.search.embed import Parts
from fuselip_core.search.index import Filters, Index
from fuselip_core.search.originals import note_place, read_original
from fuselip_core.search.query import picture_of

PROGRAM = [sys.executable, str(Path(__file__).with_name("stand_in_embedder.py"))]
EMBEDDER: Any = StandIn()
MODALITIES = ("CT", "MR", "X-ray")


def blobs(seed: int, size: int = 64) -> Image.Image:
    """A picture of a few soft blobs, so that fingerprints of different ones differ and of scaled ones don't."""
    grey = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    return Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC)


def write_archive(folder: Path, count: int, first: int = 0) -> Path:
    """`count` pictures, three to a case, and the table that describes them; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["id,image,caption,concepts,modality,case,split,licence"]
    for number in range(first, first + count):
        blobs(number).save(folder / f"{number}.png")
        split = "test" if number % 4 == 0 else "train"
        texts = f"Finding number{number} of the liver,lesion;part {number % 2}"
        lines.append(
            f"p{number},{number}.png,{texts},{MODALITIES[number % 3]},case{number // 3}-of-somebody,{split},CC BY"
        )
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def ids_in(folder: Path) -> list[str]:
    ids, _ = Index.open(folder).map()
    return sorted(ids)


def bytes_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"), 30)


@pytest.fixture(scope="module")
def built(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 30 pictures, to be read, not changed."""
    folder = tmp_path_factory.mktemp("built") / "index"
    assert build.build(archive, folder, EMBEDDER).rows == 30
    return folder


def vector_of(number: int) -> np.ndarray:
    return EMBEDDER.embed([blobs(number)], [None])[0]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_the_nearest_pictures_come_first(built: Path) -> None:
    index = Index.open(built)
    assert len(index) == 30 and index.width == WIDTH and index.model_name == "stand-in"
    hits = index.search(vector_of(7), limit=5)
    assert hits[0].id == "p7" and hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    all_vectors = np.stack([vector_of(number) for number in range(30)])
    expected = np.argsort(-(all_vectors @ vector_of(7)))[:5]
    assert [hit.id for hit in hits] == [f"p{number}" for number in expected]
    first = hits[0]
    assert (first.modality, first.case, first.split, first.licence) == ("MR", "case2-of-somebody", "train", "CC BY")
    assert first.concepts == ("lesion", "part 1") and first.caption == "Finding number7 of the liver"
    assert first.place.endswith("/7.png") and first.source == "table"
    assert first.thumbnail.startswith(b"\xff\xd8") and abs(datetime.now(UTC) - first.indexed_at) < timedelta(hours=1)
    assert index.get("p7").caption == first.caption
    assert np.allclose(index.vectors(["p9", "p7"]), [vector_of(9), vector_of(7)], atol=1e-6)
    with pytest.raises(FuselipError, match="no picture 'nobody'"):
        index.vectors(["nobody"])


def test_pages_follow_each_other(built: Path) -> None:
    index = Index.open(built)
    whole = [hit.id for hit in index.search(vector_of(3), limit=30)]
    assert len(set(whole)) == 30
    paged = [hit.id for start in range(0, 30, 7) for hit in index.search(vector_of(3), limit=7, offset=start)]
    assert paged == whole and index.search(vector_of(3), limit=5, offset=30) == []


def test_filters_and_threshold(built: Path) -> None:
    index, query = Index.open(built), vector_of(0)

    def found(**fields: Any) -> set[str]:
        return {hit.id for hit in index.search(query, limit=30, filters=Filters(**fields))}

    assert found(modality=("CT",)) == {f"p{number}" for number in range(0, 30, 3)}
    assert found(modality=("CT", "MR"), split=("test",)) == {f"p{n}" for n in range(0, 30, 4) if n % 3 < 2}
    assert found(concept=("part 1",)) == {f"p{number}" for number in range(1, 30, 2)}
    assert found(source=("it's another",)) == set()
    now = datetime.now(UTC)
    assert len(found(indexed_before=now)) == 30 and not found(indexed_after=now)
    scores = [hit.score for hit in index.search(query, limit=30)]
    assert len(index.search(query, limit=30, threshold=scores[10])) == 11
    assert index.search(query, threshold=1.1) == []


@pytest.mark.parametrize(
    "filters", [Filters(), Filters(modality=("CT", "MR")), Filters(concept=("part 1",)), Filters(split=("no",))]
)
def test_in_memory_the_same_is_found(built: Path, filters: Filters) -> None:
    for number in (0, 7):
        for depth in (1, 5, 40):
            asked = (vector_of(number), None, depth, 0, filters)
            assert Index.open(built, in_memory=True).search(*asked) == Index.open(built).search(*asked)


def test_words_and_vectors_are_fused(built: Path) -> None:
    index = Index.open(built)
    assert [hit.id for hit in index.search(None, "number12")] == ["p12"]
    far = index.search(vector_of(12), limit=30)[-1].id
    words = f"number{far[1:]}"
    hits = index.search(vector_of(12), words, limit=4)
    assert {"p12", far} <= {hit.id for hit in hits[:2]}  # first by vector, first by words
    assert next(hit for hit in hits if hit.id == "p12").score == pytest.approx(1.0, abs=1e-5)
    assert index.search(None, "zebra") == [] and len(index.search(vector_of(12), "zebra", limit=4)) == 4


def test_facets_and_info(built: Path) -> None:
    index = Index.open(built)
    assert index.facets() == {
        "modality": {"CT": 10, "MR": 10, "X-ray": 10},
        "concept": {"lesion": 30, "part 0": 15, "part 1": 15},
        "split": {"train": 22, "test": 8},
        "source": {"table": 30},
    }
    info = index.info()
    assert (info["rows"], info["cases"], info["search"]) == (30, 10, "exact")


def test_the_map_is_kept(built: Path) -> None:
    ids, places = Index.open(built).map()
    assert sorted(ids) == sorted(f"p{number}" for number in range(30))
    assert places.shape == (30, 2) and np.isfinite(places).all()
    again, same = Index.open(built).map()
    assert again == ids and np.array_equal(same, places)


@pytest.mark.parametrize("words", ["?!", "   ", "…", "—,;"])
def test_a_query_of_punctuation_is_refused(built: Path, words: str) -> None:
    with pytest.raises(FuselipError, match="no letter and no digit"):
        Index.open(built).search(vector_of(0), words)


@pytest.mark.parametrize("vector", [np.zeros(WIDTH), np.full(WIDTH, np.nan), np.ones(WIDTH + 1)])
def test_a_query_that_is_no_direction_is_refused(built: Path, vector: np.ndarray) -> None:
    with pytest.raises(FuselipError, match="finite numbers"):
        Index.open(built).search(vector)


def test_a_model_that_does_not_fit_is_refused(built: Path, archive: Path) -> None:
    other: Any = StandIn(digest="b" * 64)
    with pytest.raises(FuselipError, match="was built with stand-in"):
        Index.open(built).check_model(other.digest)
    with pytest.raises(FuselipError, match="was built with stand-in"):
        build.add(archive, built, other)


def test_no_index_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FuselipError, match=r"there is no index in .*fuselip index build"):
        Index.open(tmp_path)
    with pytest.raises(FuselipError, match="there is no index in"):
        Index.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "pictures.lance").mkdir()
    with pytest.raises(FuselipError, match="cannot be read"):
        Index.open(tmp_path)


def test_equal_pictures_are_one_hit(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        blobs(number).save(tmp_path / "in" / f"{number}.png")
    blobs(2).resize((200, 200)).save(tmp_path / "in" / "copy.jpg", quality=95)
    Image.new("L", (20, 20)).save(tmp_path / "in" / "black.png")
    Image.new("L", (20, 20)).save(tmp_path / "in" / "black again.png")
    Image.new("L", (20, 20), 1).save(tmp_path / "in" / "not quite black.png")
    build.build(tmp_path / "in", tmp_path / "index", EMBEDDER)
    index = Index.open(tmp_path / "index")
    hits = index.search(vector_of(2), limit=10)
    assert {hit.id: hit.folded for hit in hits if hit.folded} == {hits[0].id: 1, "in/black again.png": 1}
    assert len(hits) == 8 and len(index.search(vector_of(2), limit=10, fold=False)) == 10


def test_originals_are_read_where_they_were_indexed(tmp_path: Path, finished_run: Settings) -> None:
    table = write_archive(tmp_path / "a", 3)
    with zipfile.ZipFile(tmp_path / "a" / "more.zip", "w") as archive:
        archive.write(tmp_path / "a" / "0.png", "0.png")
    build.build(table, tmp_path / "index", EMBEDDER)
    index = Index.open(tmp_path / "index")
    assert index.original("p1") == (tmp_path / "a" / "1.png").read_bytes()
    blobs(77).save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").unlink()
    assert index.original("p1") is None and index.original("p2") is None
    zipped = read_original(
        note_place(Place(tmp_path / "a" / "more.zip", member="0.png")), sha256_of(tmp_path / "a" / "0.png")
    )
    assert zipped == (tmp_path / "a" / "0.png").read_bytes()
    prepared = PreparedData(finished_run.artifacts / "prepared")
    build.build(prepared.folder, tmp_path / "prepared", EMBEDDER)
    wanted = {row["image_id"]: row["bytes"] for batch in prepared.iter_images("test") for row in batch.to_pylist()}
    index = Index.open(tmp_path / "prepared")
    assert len(wanted) == 16 and {name: index.original(name) for name in wanted} == wanted


# ---- changing --------------------------------------------------------------------------------------------------------


def test_adding_twice_changes_nothing(tmp_path: Path) -> None:
    table = write_archive(tmp_path / "a", 6)
    build.build(table, tmp_path / "index", EMBEDDER)
    before = {hit.id: hit for hit in Index.open(tmp_path / "index").search(vector_of(0), limit=10)}
    outcome = build.add(table, tmp_path / "index", EMBEDDER)
    assert (outcome.rows, outcome.unchanged) == (0, 6)
    assert {hit.id: hit for hit in Index.open(tmp_path / "index").search(vector_of(0), limit=10)} == before
    blobs(99).save(tmp_path / "a" / "3.png")
    outcome = build.add(table, tmp_path / "index", EMBEDDER)
    assert (outcome.rows, outcome.unchanged) == (1, 5)
    index = Index.open(tmp_path / "index")
    assert len(index) == 6 and index.search(vector_of(99))[0].id == "p3"
    more = write_archive(tmp_path / "b", 4, first=6)
    assert build.add(more, tmp_path / "index", EMBEDDER).rows == 4
    assert len(Index.open(tmp_path / "index")) == 10
    assert Index.open(tmp_path / "index").search(None, "number8")[0].id == "p8"


def test_two_archives_of_one_name_do_not_replace_each_other(tmp_path: Path) -> None:
    for number, place in enumerate(("2023", "2024")):
        (tmp_path / place / "pictures").mkdir(parents=True)
        blobs(number).save(tmp_path / place / "pictures" / "1.png")
    build.build(tmp_path / "2023" / "pictures", tmp_path / "index", EMBEDDER)
    with pytest.raises(FuselipError, match=r"another picture in the index .* --name"):
        build.add(tmp_path / "2024" / "pictures", tmp_path / "index", EMBEDDER)
    assert len(Index.open(tmp_path / "index")) == 1
    build.add(tmp_path / "2024" / "pictures", tmp_path / "index", EMBEDDER, name="pictures of 2024")
    assert ids_in(tmp_path / "index") == ["pictures of 2024/1.png", "pictures/1.png"]


def test_an_id_that_comes_twice_is_set_aside(tmp_path: Path) -> None:
    table = write_archive(tmp_path / "a", 3)
    table.write_text(table.read_text() + "p1,2.png,again,,,,,\n")
    outcome = build.build(table, tmp_path / "index", EMBEDDER)
    assert outcome.rows == 3 and outcome.set_aside == {"repeated_id": 1}
    assert "repeated_id" in (tmp_path / "index.set_aside.jsonl").read_text()


def test_a_case_is_removed_for_good(tmp_path: Path) -> None:
    build.build(write_archive(tmp_path / "a", 30), tmp_path / "index", EMBEDDER)
    build.add(write_archive(tmp_path / "b", 3, first=30), tmp_path / "index", EMBEDDER)
    reader, holder = Index.open(tmp_path / "index"), Index.open(tmp_path / "index", in_memory=True)
    assert holder.search(vector_of(4))[0].id == "p4"
    thumbnail = reader.get("p4").thumbnail
    reader.map()
    there = bytes_below(tmp_path / "index")
    assert all(word in there for word in (b"number4 ", b"case1-of-somebody", thumbnail, b"number5 "))
    assert build.remove(tmp_path / "index", case="case1-of-somebody") == 3
    left = bytes_below(tmp_path / "index")
    for word in (b"number3 ", b"number4 ", b"number5", b"case1-of-somebody", thumbnail):
        assert word not in left
    assert b"p4" not in b"".join(path.read_bytes() for path in (tmp_path / "index").rglob("map.lance/**/*.lance"))
    assert b"number6 " in left and len(reader) == 30  # a reader that was open sees it
    for index in (reader, holder):
        found = {hit.id for hit in index.search(vector_of(4), limit=40, fold=False)}
        assert len(found) == 30 and not {"p3", "p4", "p5"} & found
    assert reader.search(None, "number4") == [] and "p4" not in reader.map()[0]
    assert build.remove(tmp_path / "index", ids=["p6"]) == 1
    assert b"number6 " not in bytes_below(tmp_path / "index")
    with pytest.raises(FuselipError, match="has no picture of case1-of-somebody"):
        build.remove(tmp_path / "index", case="case1-of-somebody")
    assert build.verify(tmp_path / "index") == 29


def test_all_can_be_removed_and_added_again(tmp_path: Path) -> None:
    table = write_archive(tmp_path / "a", 3)
    build.build(table, tmp_path / "index", EMBEDDER)
    assert build.remove(tmp_path / "index", case="case0-of-somebody") == 3
    index = Index.open(tmp_path / "index")
    assert len(index) == 0 and index.search(vector_of(0)) == [] and index.search(None, "liver") == []
    assert index.info()["rows"] == 0 and index.map()[0] == []
    build.add(table, tmp_path / "index", EMBEDDER)
    assert index.search(None, "number2")[0].id == "p2"


def test_update_adds_for_the_same_model_and_builds_for_another(tmp_path: Path) -> None:
    table = write_archive(tmp_path / "a", 3)
    assert build.update(table, tmp_path / "index", EMBEDDER).rows == 3
    index = Index.open(tmp_path / "index")
    places = index.map()
    assert build.update(table, tmp_path / "index", EMBEDDER).unchanged == 3
    assert (tmp_path / "index" / "map.lance").is_dir() and index.map()[0] == places[0]  # nothing was written
    other: Any = StandIn(digest="b" * 64)
    assert build.update(table, tmp_path / "index", other).rows == 3
    assert Index.open(tmp_path / "index").model_digest == other.digest
    (tmp_path / "damaged" / "pictures.lance").mkdir(parents=True)
    with pytest.raises(FuselipError, match="cannot be read"):
        build.update(table, tmp_path / "damaged", EMBEDDER)


def test_a_reader_notices_an_index_of_another_model(tmp_path: Path) -> None:
    table = write_archive(tmp_path / "a", 3)
    build.build(table, tmp_path / "index", EMBEDDER)
    index = Index.open(tmp_path / "index")
    other: Any = StandIn(digest="b" * 64)
    build.build(table, tmp_path / "index", other)
    with pytest.raises(FuselipError, match="was rebuilt with another model"):
        index.search(vector_of(0))
    assert Index.open(tmp_path / "index").model_digest == other.digest


def test_killed_at_any_moment_the_index_is_as_before_or_after(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build.build(write_archive(tmp_path / "a", 12), folder, EMBEDDER)
    more = write_archive(tmp_path / "b", 12, first=6)  # half of them are there already, from another place
    before, after = ids_in(folder), sorted(f"p{number}" for number in range(18))
    rng = random.Random(0)
    command = [*PROGRAM, "add", str(more), str(folder), "0.05"]
    for _ in range(5):
        child = subprocess.Popen(command)
        deadline = time.monotonic() + 240
        parts = tmp_path / ".index.parts"
        while child.poll() is None and not parts.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.0))
        child.kill()
        child.wait()
        found = ids_in(folder)
        assert found in (before, after)
        assert len(Index.open(folder).search(vector_of(7), limit=40, fold=False)) == len(found)
    assert subprocess.run(command).returncode == 0
    assert ids_in(folder) == after and build.verify(folder) == 18
    versions = list((folder / "pictures.lance" / "_versions").glob("*.manifest"))
    assert len(versions) == 1


def test_two_builders_at_once_are_refused(tmp_path: Path) -> None:
    table = write_archive(tmp_path / "a", 12)
    child = subprocess.Popen([*PROGRAM, "build", str(table), str(tmp_path / "index"), "2"])
    try:
        while child.poll() is None and not (tmp_path / ".index.parts").exists():
            time.sleep(0.02)
        with pytest.raises(FuselipError, match="another process is changing the index"):
            build.build(table, tmp_path / "index", EMBEDDER)
    finally:
        child.kill()
        child.wait()
    build.build(table, tmp_path / "index", EMBEDDER)
    assert not list(tmp_path.glob(".*")), "neither parts nor a lock file stay beside the index"


def test_a_full_disk_leaves_the_index_as_it_was(tmp_path: Path, small_disk: Path) -> None:
    build.build(write_archive(tmp_path / "a", 3), small_disk / "index", EMBEDDER)
    filler = small_disk / "filler"
    with filler.open("wb") as stream:
        free = os.statvfs(small_disk)
        stream.write(bytes(free.f_bavail * free.f_frsize - 30_000))
    more = write_archive(tmp_path / "b", 40, first=3)
    with pytest.raises(OSError) as caught:
        build.add(more, small_disk / "index", EMBEDDER)
    assert "no space is left on the disk" in sentence_of(caught.value)
    filler.unlink()
    assert len(Index.open(small_disk / "index")) == 3
    build.add(more, small_disk / "index", EMBEDDER)
    assert len(Index.open(small_disk / "index")) == 43


def test_a_disk_that_fills_while_the_table_is_written(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build(write_archive(tmp_path / "a", 3), small_disk / "index", EMBEDDER)
    batches = Parts.batches

    def fill_first(parts: Parts) -> Any:
        free = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize))
        return batches(parts)

    monkeypatch.setattr(Parts, "batches", fill_first)
    with pytest.raises(OSError) as caught:
        build.add(write_archive(tmp_path / "b", 3, first=3), small_disk / "index", EMBEDDER)
    assert "no space is left on the disk" in sentence_of(caught.value)
    (small_disk / "filler").unlink()
    assert ids_in(small_disk / "index") == ["p0", "p1", "p2"]


def test_no_identity_enters_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELIP_PSEUDONYM_KEY", "k" * 32)
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 16
    files = [save(with_identities(values + 8 * number), tmp_path / "Mustermann" / f"IM{number}") for number in range(2)]
    burned = with_identities(values, BurnedInAnnotation="YES")
    save(burned, tmp_path / "Mustermann" / "burned")
    outcome = build.build(tmp_path / "Mustermann", tmp_path / "index", EMBEDDER)
    assert outcome.rows == 2 and outcome.set_aside == {"burned_in_text": 1}
    written = bytes_below(tmp_path / "index") + (tmp_path / "index.set_aside.jsonl").read_bytes()
    for secret in (*SECRETS.values(), "Mustermann", "mustermann", "IM0"):
        assert secret.encode() not in written
    hits = Index.open(tmp_path / "index").search(EMBEDDER.embed([picture_of(files[0])], [None])[0], fold=False)
    assert len(hits) == 2 and {hit.place for hit in hits} == {""} and hits[0].case.startswith("case-")
    assert hits[0].score == pytest.approx(1.0, abs=1e-5)


def test_an_index_lies_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        values = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        boto3.client("s3", endpoint_url=values["AWS_ENDPOINT_URL"]).create_bucket(Bucket="archive")
        with pytest.raises(FuselipError, match=r"there is no index in s3://archive/index"):
            Index.open("s3://archive/index")
        build.build(write_archive(tmp_path / "a", 6), "s3://archive/index", EMBEDDER)
        build.add(write_archive(tmp_path / "b", 3, first=6), "s3://archive/index", EMBEDDER)
        index = Index.open("s3://archive/index", in_memory=True)
        assert len(index) == 9 and index.search(vector_of(7))[0].id == "p7"
        assert build.remove("s3://archive/index", case="case2-of-somebody") == 3
        assert index.search(None, "number7") == []
    finally:
        server.stop()


def test_the_command_line(finished_run: Settings, tmp_path: Path) -> None:
    folder, model = str(tmp_path / "index"), str(finished_run.artifacts / "model")

    def say(*words: str) -> str:
        done = CliRunner().invoke(app, ["index", *words, "--index", folder], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    assert "80 rows embedded" in say("build", str(finished_run.artifacts / "prepared"), "--model", model)
    assert "80 unchanged" in say("add", str(finished_run.artifacts / "prepared"))
    assert "80 pictures" in say("verify")
    assert "rows            80" in say("info") and json.loads(say("info", "--json"))["rows"] == 80
    hits = json.loads(say("search", "--text", "the left half is bright", "--split", "test", "--limit", "3", "--json"))
    assert len(hits) == 3 and {hit["split"] for hit in hits} == {"test"}
    blobs(1).save(tmp_path / "query.png")
    assert "half is bright" in say("search", "--image", str(tmp_path / "query.png"), "--text", "left", "--limit", "2")
    assert "1 pictures removed" in say("remove", "--case", hits[0]["case"])
    for words, said in ((["search"], "neither words nor a picture"), (["search", "--text", "?"], "no letter")):
        with pytest.raises(FuselipError, match=said):
            say(*words)
