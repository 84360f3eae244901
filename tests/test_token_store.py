"""The token store: what is written is read back, a kill loses nothing finished, and a mismatch is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fuselip_core.data.tokens.store import ABSENT, PairColumns, TokenStore, gather
from fuselip_core.data.tokens.writer import TokenStoreWriter, index_pairs, write_manifest
from fuselip_core.errors import FuselipError

KINDS = ("caption", "vqa")
IDENTITY = {"codebook": "c0ffee", "data_version": "v1", "preprocessing": {"size": 16}, "views": 2, "context_length": 20}


def codes_of(rows: range, views: int = 2, codes_per_image: int = 4) -> np.ndarray:
    """Codes that tell row, view and place: 100 row + 10 view + place."""
    rows_, views_, places = np.ix_(np.array(rows), np.arange(views), np.arange(codes_per_image))
    return 100 * rows_ + 10 * views_ + places


def write_store(folder: Path, split: str = "train", images: int = 6, identity: dict | None = None) -> TokenStore:
    """Images 0.., texts "a", "bb", "" and "dddd" as ids [1], [2, 2], [] and [4, 4, 4, 4]; three pairs."""
    identity = IDENTITY if identity is None else identity
    writer = TokenStoreWriter(folder, split, images, 2, 4, identity)
    for start, stop in writer.pending(4):
        writer.write_codes(start, codes_of(range(start, stop)))
    pairs = PairColumns(
        query_image=np.array([0, 5, ABSENT]),
        query_text=np.array([ABSENT, 1, 3]),
        target_image=np.array([ABSENT, ABSENT, 2]),
        target_text=np.array([0, 2, ABSENT]),
        kind=np.array([0, 1, 0]),
        group=np.array([0, 1, ABSENT]),
        answer_type=np.array([0, 1, 0]),
    )
    ids, offsets = np.array([1, 2, 2, 4, 4, 4, 4]), np.array([0, 1, 3, 3, 7])
    writer.finish(pairs, ids, offsets, ["a", "bb", "", "dddd"], np.arange(4))
    write_manifest(folder, identity, KINDS)
    return TokenStore(folder, split)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    assert (len(store), store.images, store.views, store.codes_per_image) == (3, 6, 2, 4)
    np.testing.assert_array_equal(store.codes, codes_of(range(6)))
    assert store.codes.dtype == store.texts.dtype == np.uint16
    np.testing.assert_array_equal(store.blank, [0, 1, 2, 3])
    np.testing.assert_array_equal(store.rows_of("caption"), [0, 2])
    assert store.texts_of([3, ABSENT, 0, 2]) == ["dddd", "", "a", ""]
    assert store.manifest["splits"]["train"]["pairs"] == {"caption": 2, "vqa": 1}
    assert not (tmp_path / "train.partial").exists()
    with pytest.raises(ValueError, match="read-only"):
        store.codes[0, 0, 0] = 1


def test_gather_pads_to_the_longest_text_of_the_batch(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    query = gather(store, np.array([2, 0, 1]), "query")
    np.testing.assert_array_equal(query.has_image, [False, True, True])
    np.testing.assert_array_equal(query.codes, [[0, 0, 0, 0], [0, 1, 2, 3], [500, 501, 502, 503]])
    np.testing.assert_array_equal(query.text_ids, [[4, 4, 4, 4], [0, 0, 0, 0], [2, 2, 0, 0]])
    np.testing.assert_array_equal(query.text_lengths, [4, 0, 2])
    target = gather(store, np.array([0, 1]), "target")
    np.testing.assert_array_equal(target.text_ids, [[1], [0]])
    assert not target.has_image.any() and not target.codes.any()
    without = gather(store, np.array([0, 0]), "query")
    assert without.text_ids.shape == (2, 0)


def test_gather_equals_a_loop_over_pairs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(0, 30, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(1, 49406, offsets[-1])
    writer = TokenStoreWriter(tmp_path, "train", 20, 3, 8)
    codes = random.integers(0, 65536, (20, 3, 8))
    writer.write_codes(0, codes)
    column = {name: random.integers(-1, 20, 200) for name in ("query_image", "target_image", "query_text")}
    column |= {"target_text": random.integers(-1, 50, 200), "group": np.arange(200)}
    pairs = PairColumns(**column, kind=np.zeros(200, int), answer_type=np.zeros(200, int))
    writer.finish(pairs, ids, offsets, [f"text {row}" for row in range(50)], np.zeros(8))
    write_manifest(tmp_path, {}, ["caption"])
    store = TokenStore(tmp_path, "train")
    rows = random.permutation(200)[:64]
    side = gather(store, rows, "target", np.random.default_rng(7))
    views = np.random.default_rng(7).integers(0, 3, 64)
    for place, row in enumerate(rows):
        image, text = column["target_image"][row], column["target_text"][row]
        assert side.has_image[place] == (image >= 0)
        np.testing.assert_array_equal(side.codes[place], codes[image, views[place]] if image >= 0 else np.zeros(8))
        expected = ids[offsets[text] : offsets[text + 1]] if text >= 0 else []
        assert side.text_lengths[place] == len(expected)
        np.testing.assert_array_equal(side.text_ids[place, : len(expected)], expected)
        assert not side.text_ids[place, len(expected) :].any()


def test_sides_can_be_cut(tmp_path: Path) -> None:
    side = gather(write_store(tmp_path), np.array([2, 0, 1]), "query")
    part = side.part(slice(1, 3))
    np.testing.assert_array_equal(part.text_ids, [[0, 0], [2, 2]])
    assert len(part) == 2
    np.testing.assert_array_equal(side.with_codes(np.arange(4)).codes, [[0, 1, 2, 3]] * 3)


def test_pages_are_released_without_changing_what_is_read(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    before = np.array(store.codes)
    store.release()
    np.testing.assert_array_equal(store.codes, before)


def test_a_killed_writer_keeps_finished_shards(tmp_path: Path) -> None:
    """A process that dies without any clean-up between shards, and once in the middle of writing one."""
    script = f"""
import os, signal, sys
import numpy as np
from fuselip_core.data.tokens.writer import TokenStoreWriter
writer = TokenStoreWriter({str(tmp_path)!r}, "train", 1000, 2, 4, {IDENTITY!r})
for start, stop in writer.pending(100)[: int(sys.argv[1])]:
    writer.write_codes(start, np.full((stop - start, 2, 4), start))
if sys.argv[2] == "half":
    # What a shard cut off half-way leaves behind: bytes without a marker.
    with open(writer.partial / "codes.npy", "r+b") as stream:
        stream.seek(-50, 2)
        stream.write(b"x" * 50)
os.kill(os.getpid(), signal.SIGKILL)
"""
    for shards, end in (("3", "whole"), ("2", "half")):
        killed = subprocess.run([sys.executable, "-c", script, shards, end], cwd=Path(__file__).parents[1], check=False)
        assert killed.returncode == -signal.SIGKILL
    writer = TokenStoreWriter(tmp_path, "train", 1000, 2, 4, IDENTITY)
    assert writer.done_rows.sum() == 500
    assert writer.pending(100) == [(start, start + 100) for start in range(500, 1000, 100)]
    assert writer.pending(250) == [(500, 750), (750, 1000)]
    assert not (tmp_path / "train").exists()
    for start, stop in writer.pending(100):
        writer.write_codes(start, np.full((stop - start, 2, 4), start))
    nothing = np.zeros(0, int)
    writer.finish(PairColumns(*[nothing] * 7), nothing, np.zeros(1), [], np.zeros(4))
    write_manifest(tmp_path, IDENTITY, KINDS)
    codes = TokenStore(tmp_path, "train").codes
    np.testing.assert_array_equal(codes[:, 0, 0], np.arange(1000) // 100 * 100)
    np.testing.assert_array_equal(codes[:, 1, 3], np.arange(1000) // 100 * 100)


def test_work_of_another_identity_is_thrown_away(tmp_path: Path) -> None:
    TokenStoreWriter(tmp_path, "train", 6, 2, 4, IDENTITY).write_codes(0, codes_of(range(3)))
    other = TokenStoreWriter(tmp_path, "train", 6, 2, 4, {**IDENTITY, "codebook": "beef"})
    assert not other.done_rows.any()


def test_a_finished_split_is_recognised_and_an_unfinished_one_refused(tmp_path: Path) -> None:
    write_store(tmp_path)
    again = TokenStoreWriter(tmp_path, "train", 6, 2, 4, IDENTITY)
    assert again.finished and again.pending(4) == []
    other = TokenStoreWriter(tmp_path, "train", 6, 2, 4, {**IDENTITY, "data_version": "v2"})
    assert not other.finished and other.pending(4) == [(0, 4), (4, 6)]
    with pytest.raises(FuselipError, match="6 images of split 'train' have no codes"):
        other.finish(PairColumns(*[np.zeros(0)] * 7), np.zeros(0), np.zeros(1), [], np.zeros(4))


def test_a_split_newer_than_the_manifest_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "codebook": "old"}))
    with pytest.raises(FuselipError, match=r"differ in codebook.*tokenize"):
        TokenStore(tmp_path, "train")


@pytest.mark.parametrize("absent", ["store", "split", "kind"])
def test_what_is_missing_is_named(tmp_path: Path, absent: str) -> None:
    if absent == "store":
        with pytest.raises(FuselipError, match="no finished token store"):
            TokenStore(tmp_path, "train")
        return
    store = write_store(tmp_path)
    if absent == "split":
        with pytest.raises(FuselipError, match="no split 'valid'"):
            TokenStore(tmp_path, "valid")
    else:
        with pytest.raises(FuselipError, match=r"no pairs of kind 'region'.*caption \(2\), vqa \(1\)"):
            store.rows_of("region")


def test_a_truncated_column_is_damage_not_a_crash(tmp_path: Path) -> None:
    write_store(tmp_path)
    place = tmp_path / "train"
    (place / "texts.arrow").write_bytes((place / "texts.arrow").read_bytes()[:40])
    with pytest.raises(FuselipError, match=r"texts\.arrow is damaged"):
        TokenStore(tmp_path, "train").texts_of([0])
    for name in ("blank.npy", "codes.npy"):
        whole = (place / name).read_bytes()
        for content in (whole[:130], whole[:20], b"", b"garbage" * 40):
            (place / name).write_bytes(content)
            with pytest.raises(FuselipError, match=rf"{name} is damaged"):
                TokenStore(tmp_path, "train")
        (place / name).write_bytes(whole)
    for text in ("[]", "{}", "{", '{"identity": 3}'):
        (place / "split.json").write_text(text)
        with pytest.raises(FuselipError, match=r"split\.json is damaged"):
            TokenStore(tmp_path, "train")


@pytest.mark.parametrize(
    ("start", "shape", "value", "message"),
    [(0, (3, 2, 5), 0, "do not fit"), (5, (2, 2, 4), 0, "do not fit"), (0, (1, 2, 4), 70000, "0..65535")],
)
def test_codes_that_do_not_fit_are_refused(
    tmp_path: Path, start: int, shape: tuple[int, ...], value: int, message: str
) -> None:
    writer = TokenStoreWriter(tmp_path, "train", 6, 2, 4)
    with pytest.raises(FuselipError, match=message):
        writer.write_codes(start, np.full(shape, value))
    assert not writer.done_rows.any()


def pair_table(**changes: list) -> pa.Table:
    columns = {
        "kind": ["caption", "caption", "vqa"],
        "group": ["g1", "g2", "g2"],
        "query_image": ["x", "y", "y"],
        "query_text": [None, None, "what?"],
        "target_image": [None, None, None],
        "target_text": ["same", "same", "liver"],
        "answer_type": [None, None, "open"],
    } | changes
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def test_pairs_become_row_indices_and_equal_texts_one_row() -> None:
    columns, texts = index_pairs(pair_table(), ["y", "x"], KINDS)
    assert set(texts.to_pylist()) == {"what?", "same", "liver"}
    row = texts.to_pylist().index
    np.testing.assert_array_equal(columns.query_image, [1, 0, 0])
    np.testing.assert_array_equal(columns.target_image, [ABSENT] * 3)
    np.testing.assert_array_equal(columns.query_text, [ABSENT, ABSENT, row("what?")])
    np.testing.assert_array_equal(columns.target_text, [row("same"), row("same"), row("liver")])
    np.testing.assert_array_equal(columns.kind, [0, 0, 1])
    np.testing.assert_array_equal(columns.group, [0, 1, 1])
    np.testing.assert_array_equal(columns.answer_type, [0, 0, 2])


def test_a_pair_of_an_unknown_image_is_named() -> None:
    with pytest.raises(FuselipError, match="image 'z'"):
        index_pairs(pair_table(query_image=["x", "z", "y"]), ["y", "x"], KINDS)
    with pytest.raises(FuselipError, match="kind 'region'"):
        index_pairs(pair_table(kind=["caption", "region", "vqa"]), ["y", "x"], KINDS)


def test_images_with_the_same_concepts_are_alike(tmp_path: Path) -> None:
    table = pair_table(
        query_image=["a", "b", "c", "d", "d", "a"],
        query_text=[None, None, None, None, None, "which?"],
        target_image=[None] * 6,
        target_text=["one", "two", "three", "four", "five", "six"],
        kind=["caption"] * 5 + ["vqa"],
        group=["a", "b", "c", "d", "d", "a"],
        answer_type=[None] * 6,
    )
    concepts = pa.chunked_array([pa.array([["CT", "head"], []]), pa.array([["head", "CT", "CT"], None])])
    columns, _ = index_pairs(table, ["a", "b", "c", "d"], KINDS, concepts)
    # a and c have the same concepts, d is like itself only, b like nothing, and a question is never alike.
    np.testing.assert_array_equal(columns.alike, [0, 1, 0, 3, 3, ABSENT])


def test_a_store_from_before_the_column_alike_is_read(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    np.testing.assert_array_equal(store.pairs.alike, [ABSENT] * 3)
    (tmp_path / "train" / "alike.npy").unlink()
    np.testing.assert_array_equal(TokenStore(tmp_path, "train").pairs.alike, [ABSENT] * 3)
