"""Raw data to shards, on real data whole, with everything that goes wrong in practice, and killed in the middle."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import DataError
from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.errors import FuselipError
from fuselip_core.files import sha256_of

COUNTS = {"train": 40, "valid": 8, "test": 10}


def settings(root: Path, source: str = "phantom", **changes: object) -> PrepareSettings:
    return PrepareSettings.model_validate({"source": source, "root": root, "workers": 1, **changes})


def quarantine(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


def cases(prepared: PreparedData, split: str) -> set[str]:
    batches = prepared.iter_images(split, columns=["case"])
    return {case for batch in batches for case in batch.column("case").to_pylist()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    draw_data_set(folder, seed=0, counts=COUNTS)
    return folder


def test_medpix_whole(shared: Path, tmp_path: Path) -> None:
    """1,850 real images in ROCOv2's published layout: nothing is lost but placeholders, no case is on two sides."""
    root = shared / "data" / "medpix-rocov2"
    manifest = prepare_data(settings(root, "rocov2", dev_share=0.05), tmp_path / "prepared")
    prepared = PreparedData(tmp_path / "prepared")
    assert prepared.splits == ("train", "dev", "valid")
    assert prepared.image_count("valid") == 197
    assert sum(prepared.manifest["counts"]["valid"]["pairs"].values()) == 191
    assert prepared.image_count("train") + prepared.image_count("dev") == 1653
    assert 60 < prepared.image_count("dev") < 110
    assert manifest["quarantine"] == {"placeholder_caption": 23}
    sides = [cases(prepared, split) for split in prepared.splits]
    assert sum(map(len, sides)) == len(set().union(*sides))
    texts = (
        prepared.pairs("train").column("target_text").to_pylist() + prepared.pairs("valid")["target_text"].to_pylist()
    )
    assert not any("\n" in text or "Replace this" in text for text in texts)
    with zipfile.ZipFile(root / "valid_images.zip") as archive:
        names = [Path(name).stem for name in archive.namelist()]
        published = {name: archive.read(f"valid/{name}.jpg") for name in names}
    for batch in prepared.iter_images("valid", columns=["image_id", "bytes"], batch_rows=50):
        assert batch.num_rows <= 50
        assert all(published.pop(row["image_id"]) == row["bytes"] for row in batch.to_pylist())
    assert not published


@pytest.mark.parametrize(("shared_images", "train"), [("drop", 726), ("keep", 1797)])
def test_vqa_rad_shares_no_image_unless_asked_to(shared: Path, tmp_path: Path, shared_images: str, train: int) -> None:
    root = shared / "data" / "vqa-rad"
    manifest = prepare_data(settings(root, "vqa-rad", shared_images=shared_images), tmp_path / "prepared")
    prepared = PreparedData(tmp_path / "prepared")
    assert prepared.manifest["counts"]["test"]["pairs"]["vqa"] == 451
    assert prepared.manifest["counts"]["train"]["pairs"]["vqa"] == train
    overlap = set(prepared.pairs("train")["query_image"].to_pylist()) & set(
        prepared.pairs("test")["query_image"].to_pylist()
    )
    assert len(overlap) == (0 if shared_images == "drop" else 202)
    assert bool(cases(prepared, "train") & cases(prepared, "test")) == (shared_images == "keep")
    assert any("202 of 313 training images" in note for note in manifest["notes"])
    assert set(prepared.pairs("test")["answer_type"].to_pylist()) == {"closed", "open"}


def test_the_same_data_gives_the_same_version(raw: Path, tmp_path: Path) -> None:
    first = prepare_data(settings(raw, rows_per_shard=8), tmp_path / "first")
    second = prepare_data(settings(raw, rows_per_shard=8, workers=2), tmp_path / "second")
    assert first["data_version"] == second["data_version"]
    for shard in first["shards"]:
        path = tmp_path / "second" / shard["path"]
        assert sha256_of(path) == shard["sha256"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(
        [shard["path"] for shard in first["shards"]] + ["manifest.json", "quarantine.jsonl"]
    )
    assert sum(shard["rows"] for shard in first["shards"] if shard["path"].startswith("images-train")) == 40
    other = prepare_data(settings(raw, limit=5), tmp_path / "first")
    assert other["data_version"] != first["data_version"]
    assert other["counts"]["train"] == {
        "images": 5,
        "cases": other["counts"]["train"]["cases"],
        "pairs": {"caption": 5, "vqa": 20},
    }
    assert not list(tmp_path.glob("*.partial"))


def damaged(
    raw: Path, folder: Path, spoil: Callable[[int, bytes], bytes], splits: tuple[str, ...] = ("train",)
) -> Path:
    """A copy of `raw`; the images of `splits` went through `spoil` (their number, their bytes)."""
    shutil.copytree(raw, folder)
    for name in (f"{split}_images.zip" for split in splits):
        with zipfile.ZipFile(raw / name) as old, zipfile.ZipFile(folder / name, "w") as new:
            for number, member in enumerate(old.namelist()):
                new.writestr(member, spoil(number, old.read(member)))
    return folder


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_set_aside_and_the_run_goes_on(raw: Path, tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    with zipfile.ZipFile(raw / "test_images.zip") as archive:
        of_test = archive.read(archive.namelist()[0])
    bad = {0: b"", 1: b"GIF, they said", 2: bomb.getvalue(), 4: of_test}

    def spoil(number: int, data: bytes) -> bytes:
        return data[: len(data) // 3] if number == 3 else bad.get(number, data)

    root = damaged(raw, tmp_path / "damaged", spoil)
    archive_path = root / "valid_images.zip"
    content = bytearray(archive_path.read_bytes())
    content[200] ^= 0xFF  # inside the first member: its checksum no longer holds
    archive_path.write_bytes(content)
    captions = root / "train_captions.csv"
    lines = captions.read_text(encoding="utf-8").splitlines()
    lines[6] = lines[6].split(",")[0] + ", "
    lines[7] = lines[7].split(",")[0] + ',"Replace this -\nDESCRIPTION OF THE IMAGE"'
    captions.write_text("\n".join(lines), encoding="utf-8")

    manifest = prepare_data(settings(root, rows_per_shard=16, workers=2, most_set_aside=0.2), tmp_path / "prepared")
    found = [(item["split"], item["reason"]) for item in quarantine(tmp_path / "prepared")]
    expected = ["empty_image", "not_an_image", "too_large", "damaged_image", "copy_in_held_out"]
    assert [reason for split, reason in found if split == "train"] == [
        "empty_caption",
        "placeholder_caption",
        *expected,
    ]
    assert ("valid", "damaged_archive") in found
    assert manifest["quarantine"] == {reason: 1 for _, reason in found}
    assert manifest["duplicates"]["across_splits_left_out"] == 1
    assert manifest["counts"]["train"]["images"] == 35
    # Images of unusable captions stay as images and keep their questions; unreadable images take theirs along.
    assert manifest["counts"]["train"]["pairs"] == {"caption": 33, "vqa": 140}
    prepared = PreparedData(tmp_path / "prepared")
    ids = {
        name for batch in prepared.iter_images("train", ["image_id"]) for name in batch.column("image_id").to_pylist()
    }
    assert set(prepared.pairs("train")["query_image"].to_pylist()) <= ids


def test_a_case_in_two_splits_is_taken_out_of_training(raw: Path, tmp_path: Path) -> None:
    root = damaged(raw, tmp_path / "leaky", lambda number, data: data)
    path = root / "license_information.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    test_case = next(line.split(",")[1] for line in lines if "_test_" in line)
    first = next(number for number, line in enumerate(lines) if "_train_" in line)
    old_case = lines[first].split(",")[1]
    moved = [line for line in lines if f",{old_case}," in line]
    path.write_text("\n".join(lines).replace(f",{old_case},", f",{test_case},"), encoding="utf-8")
    manifest = prepare_data(settings(root), tmp_path / "prepared")
    assert manifest["quarantine"] == {"case_in_held_out": len(moved)}
    prepared = PreparedData(tmp_path / "prepared")
    assert not cases(prepared, "train") & cases(prepared, "test")


def test_dev_takes_whole_cases_and_depends_on_the_seed_alone(raw: Path, tmp_path: Path) -> None:
    chosen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_data(settings(raw, dev_share=0.2, seed=seed), tmp_path / name)
        prepared = PreparedData(tmp_path / name)
        assert not cases(prepared, "dev") & cases(prepared, "train")
        assert prepared.image_count("dev") + prepared.image_count("train") == 40
        assert set(prepared.pairs("dev")["split"].to_pylist()) == {"dev"}
        chosen.append(cases(prepared, "dev"))
    assert chosen[0] == chosen[1] != chosen[2]


KILLED = """
import sys, time
from pathlib import Path
import fuselip_core.data.prepare.image_shards as shards
from fuselip_core.config import PrepareSettings
from fuselip_core.data.prepare.prepare import prepare_data
decode = shards.decode
shards.decode = lambda *arguments: (time.sleep(0.03), decode(*arguments))[1]
prepare_data(PrepareSettings(source="phantom", root=sys.argv[1], rows_per_shard=5, workers=1), Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_with_the_first_unfinished_shard(raw: Path, tmp_path: Path) -> None:
    target, work = tmp_path / "prepared", tmp_path / "prepared.partial"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(raw), str(target)])
    try:
        deadline = time.monotonic() + 60
        while len(list(work.glob("images-train-*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not target.exists()
    finished = {path: path.stat().st_ino for path in work.glob("images-*.parquet") if Path(f"{path}.json").exists()}
    assert len(finished) >= 2
    manifest = prepare_data(settings(raw, rows_per_shard=5), target)
    after = {path.name: path.stat().st_ino for path in target.iterdir()}
    assert all(after[path.name] == inode for path, inode in finished.items())
    assert manifest["data_version"] == prepare_data(settings(raw, rows_per_shard=5), tmp_path / "whole")["data_version"]


INTERRUPTED = """
import os, pathlib, sys, time
from fuselip_core.data.workers import process_pool

def work(folder):
    pathlib.Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    with process_pool(2) as pool:
        [pool.submit(work, sys.argv[1]) for _ in range(9)]
        time.sleep(600)
"""


def test_an_interrupt_ends_the_workers_at_once_and_without_a_word_of_theirs(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(INTERRUPTED)
    (tmp_path / "seen").mkdir()
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "seen")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "seen").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)  # until the last of them has closed its end of the pipe
    assert process.returncode and said.count("Traceback") == 1 and "SpawnProcess" not in said
    for path in (tmp_path / "seen").iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_other_settings_do_not_take_over_unfinished_work(raw: Path, tmp_path: Path) -> None:
    work = tmp_path / "prepared.partial"
    work.mkdir()
    (work / "key.json").write_text('{"key": "of another run"}')
    (work / "images-train-00000-of-00001.parquet").write_bytes(b"stale")
    (work / "images-train-00000-of-00001.parquet.json").write_text("{}")
    assert prepare_data(settings(raw), tmp_path / "prepared")["counts"]["train"]["images"] == 40


@pytest.mark.parametrize("source", ["phantom", "rocov2", "vqa-rad"])
def test_a_missing_folder_is_one_sentence(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match="nowhere") as raised:
        prepare_data(settings(tmp_path / "nowhere", source), tmp_path / "prepared")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "prepared").exists()


def test_nothing_usable_is_an_error(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no usable pair \(.*empty_image.*\)") as raised:
        nothing = damaged(raw, tmp_path / "empty", lambda *_: b"", ("train", "valid", "test"))
        prepare_data(settings(nothing), tmp_path / "prepared")
    assert Path(str(raised.value).split("; ")[1].removeprefix("see ")).read_text().count("\n") > 1


def half(number: int, data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_that_loses_every_image_is_an_error(raw: Path, tmp_path: Path, split: str) -> None:
    lost = damaged(raw, tmp_path / "raw", half, (split,))
    count = COUNTS[split]
    words = rf"split '{split}' of .*raw has no usable image \({count} damaged_image\); see .*quarantine.jsonl"
    for most in (0.05, 1.0):  # no share allows it
        with pytest.raises(DataError, match=words):
            prepare_data(settings(lost, most_set_aside=most), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_a_split_without_any_of_its_files_is_an_error(raw: Path, tmp_path: Path) -> None:
    root = tmp_path / "raw"
    shutil.copytree(raw, root)
    with zipfile.ZipFile(root / "valid_images.zip", "w") as archive:
        archive.writestr("valid/unasked.jpg", b"")
    with pytest.raises(DataError, match=r"split 'valid' of .* has no usable image \(40 missing_image"):
        prepare_data(settings(root), tmp_path / "prepared")


def test_more_loss_than_allowed_stops_and_is_gone_on_from(raw: Path, tmp_path: Path) -> None:
    lost = damaged(raw, tmp_path / "raw", lambda number, data: half(number, data) if number < 10 else data)
    with pytest.raises(DataError) as raised:
        prepare_data(settings(lost, rows_per_shard=5), tmp_path / "prepared")
    assert "10 of 58 samples" in str(raised.value) and "(10 damaged_image)" in str(raised.value)
    assert "more than the 5% that prepare.most_set_aside allows" in str(raised.value)
    work = tmp_path / "prepared.partial"
    finished = {path.name: path.stat().st_ino for path in work.glob("images-*.parquet")}
    assert len(finished) > 8 and str(work / "quarantine.jsonl") in str(raised.value)
    manifest = prepare_data(settings(lost, rows_per_shard=5, most_set_aside=0.2), tmp_path / "prepared")
    assert manifest["counts"]["train"]["images"] == 30 and manifest["quarantine"] == {"damaged_image": 10}
    assert {name: (tmp_path / "prepared" / name).stat().st_ino for name in finished} == finished


def test_a_limit_does_not_make_the_same_losses_a_larger_share(raw: Path, tmp_path: Path) -> None:
    root = tmp_path / "raw"
    shutil.copytree(raw, root)
    captions = root / "train_captions.csv"
    lines = captions.read_text(encoding="utf-8").splitlines()
    lines[-2:] = [line.partition(",")[0] + "," for line in lines[-2:]]
    captions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for limit in (None, 4):
        manifest = prepare_data(settings(root, limit=limit), tmp_path / f"prepared-{limit}")
        assert manifest["quarantine"]["empty_caption"] == 2
    with pytest.raises(DataError, match="2 of 58 samples"):
        prepare_data(settings(root, limit=4, most_set_aside=0.03), tmp_path / "prepared")


def test_copies_of_held_out_images_are_no_loss(raw: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(raw / "test_images.zip") as archive:
        copies = [archive.read(name) for name in archive.namelist()]
    copied = damaged(raw, tmp_path / "raw", lambda number, data: copies[number] if number < len(copies) else data)
    manifest = prepare_data(settings(copied, most_set_aside=0), tmp_path / "prepared")
    assert manifest["quarantine"] == {"copy_in_held_out": 10}


def test_unsafe_members_count_and_the_end_says_what_was_set_aside(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "raw"
    shutil.copytree(raw, root)
    with zipfile.ZipFile(root / "train_images.zip", "a") as archive:
        for number in range(4):
            archive.writestr(f"../escape-{number}.jpg", b"")
    with pytest.raises(DataError, match=r"4 of 62 samples .* \(4 unsafe_member\)"):
        prepare_data(settings(root), tmp_path / "prepared")
    with caplog.at_level("INFO", logger="fuselip"):
        prepare_data(settings(root, most_set_aside=0.1), tmp_path / "prepared")
    assert any(line.startswith("train: 40 images, ") for line in caplog.messages)
    assert caplog.messages[-1] == f"set aside: 4 unsafe member; see {tmp_path / 'prepared' / 'quarantine.jsonl'}"


def test_reading_what_is_not_there_is_one_sentence(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fuselip prepare"):
        PreparedData(tmp_path)
    with pytest.raises(
        DataError, match=rf"if it is raw data, run `fuselip data prepare --root {raw}` and give"
    ) as said:
        PreparedData(raw)
    assert "--out" not in str(said.value)  # which would replace the raw data
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"name": "of a web page"}')
    with pytest.raises(DataError, match=r"is damaged or foreign .* if it is raw data, run `fuselip data prepare"):
        PreparedData(tmp_path / "foreign")
    prepare_data(settings(raw), tmp_path / "prepared")
    prepared = PreparedData(tmp_path / "prepared")
    with pytest.raises(DataError, match="train, valid, test"):
        prepared.pairs("dev")
    shard = tmp_path / "prepared" / "pairs-test-00000-of-00001.parquet"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], bytes(len(whole)), b""):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"pairs-test.* is damaged .* run `fuselip prepare` again"):
            prepared.pairs("test")
    images = next((tmp_path / "prepared").glob("images-train-*"))
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"images-train.* is damaged"):
        list(prepared.iter_images("train"))
    shard.unlink()
    with pytest.raises(DataError, match="pairs-test"):
        PreparedData(tmp_path / "prepared")
    for content in (b"{", b"[]", b"{}", b"\xff"):
        (tmp_path / "prepared" / "manifest.json").write_bytes(content)
        with pytest.raises(FuselipError, match=r"manifest\.json is damaged"):
            PreparedData(tmp_path / "prepared")


# ---- what must not be replaced, and by whom --------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_raw_data_is_never_replaced_by_what_is_made_of_it(raw: Path, tmp_path: Path) -> None:
    root = damaged(raw, tmp_path / "home" / "raw", lambda number, data: data)
    before = state_of(tmp_path)
    for target in (root, root.parent, tmp_path / "home" / ".." / "home" / "raw"):
        with pytest.raises(DataError, match="holds the raw data"):
            prepare_data(settings(root), target)
    assert state_of(tmp_path) == before


def test_what_is_no_prepared_data_is_not_replaced(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("of somebody")
    before = state_of(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(DataError, match="holds no prepared data"):
            prepare_data(settings(raw), tmp_path / name)
    with pytest.raises(DataError, match="move them away"):
        prepare_data(settings(raw), tmp_path / "out")
    with pytest.raises(DataError, match="cannot be created"):
        prepare_data(settings(raw), tmp_path / "file" / "below" / "out")
    assert state_of(tmp_path) == before


def test_only_one_process_prepares_into_a_folder(raw: Path, tmp_path: Path) -> None:
    target = tmp_path / "prepared"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(raw), str(target)])
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "prepared.partial").glob("images-*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(DataError, match="another process is preparing data into"):
            prepare_data(settings(raw, rows_per_shard=5), target)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    # The lock has gone with its holder, and the next one removes its file.
    prepare_data(settings(raw, rows_per_shard=5), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared"]


def test_the_download_s_licence_and_version_go_along(raw: Path, tmp_path: Path) -> None:
    root = damaged(raw, tmp_path / "raw", lambda number, data: data)
    (root / "license_information.csv").unlink()
    note = {"source": "zenodo:10821435", "revision": "10821435", "licence": "cc-by-nc-4.0", "page": "x", "files": []}
    (root / "download.json").write_text(json.dumps(note))
    manifest = prepare_data(settings(root), tmp_path / "out")
    assert manifest["origin"] == {name: note[name] for name in ("source", "revision", "licence")}
    rows = next(PreparedData(tmp_path / "out").iter_images("test", ["licence", "attribution"])).to_pylist()
    assert rows[0] == {"licence": "cc-by-nc-4.0", "attribution": "zenodo:10821435"}
    (root / ".test_images.zip.partial").write_bytes(b"half of it")
    with pytest.raises(DataError, match="incomplete download"):
        prepare_data(settings(root), tmp_path / "out")
