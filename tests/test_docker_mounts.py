"""What is mounted into the images: a data set still to come, in each layout, half there; folders without room."""

from __future__ import annotations

import csv
import json
import os
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine import CLOSED, Mounted, image_of, run
from fake_hub import FakeHub, Fault

from fuselip_core.config import PrepareSettings
from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.data.prepare.prepare import prepare_data

USER = 12345
ROCO = "eltorio/ROCOv2-radiology"
# Nothing is trained longer than it takes to see that the data arrive.
LITTLE = ("codebook.steps=1", "codebook.batch_size=4", "tokenize.views=1", "train.steps=2", "train.batch_size=8")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.getuid() != 0, reason="only root can make folders for another user"),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little data in ROCOv2's published layout."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    draw_data_set(folder, 0, {"train": 24, "valid": 8})
    return folder


def test_a_user_without_a_name_downloads_goes_on_and_verifies(drawn: Path, tmp_path: Path) -> None:
    image = image_of("download")
    names = {"train": "data/train-00000-of-00001.parquet", "valid": "data/validation-00000-of-00001.parquet"}
    files: dict[str, bytes | Path] = {"README.md": b"a data set"}
    for split, name in names.items():
        files[name] = as_parquet(drawn, split, tmp_path / f"{split}.parquet")
    target = tmp_path / "ROCOv2_data"
    target.mkdir()
    os.chown(target, USER, USER)
    hub = FakeHub()
    hub.add_repo(ROCO, files, set(names.values()))
    mount = ("-v", f"{target}:/app/fuselip/ROCOv2_data", "--network", "host", "-e", f"HF_ENDPOINT={hub.url}")
    with hub.running():
        hub.fail("/store/", Fault(cut_after=20_000))
        done = run(image, options=(*CLOSED, *mount))
        assert done.returncode == 0 and "all complete" in done.stderr, done.stderr
        fetched = len(hub.requests_for("/store/"))
        again = run(image, "--verify", "full", options=(*CLOSED, *mount))
        assert again.returncode == 0 and "all complete" in again.stderr and "verified" not in again.stderr, again.stderr
        assert len(hub.requests_for("/store/")) == fetched, "fetched again"
        wrong = run(image, "rocov", options=(*CLOSED, *mount))
    assert wrong.returncode != 0 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
    for name, content in files.items():
        assert (target / name).read_bytes() == (content if isinstance(content, bytes) else content.read_bytes())
    assert {path.stat().st_uid for path in target.rglob("*")} == {USER}


def test_no_room_for_a_download_is_one_sentence(drawn: Path, tmp_path: Path) -> None:
    image = image_of("download")
    hub = FakeHub()
    name = "data/train-00000-of-00001.parquet"
    hub.add_repo(ROCO, {name: as_parquet(drawn, "train", tmp_path / "train.parquet")}, {name})
    room = ("--tmpfs", f"/app/fuselip/ROCOv2_data:size=64k,uid={USER}", "--network", "host")
    with hub.running():
        done = run(image, options=(*CLOSED, *room, "-e", f"HF_ENDPOINT={hub.url}"))
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("error: ") and "free some space" in said, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("layout", ["sidecars", "parquet", "shards"])
def test_every_layout_of_the_data_set_is_trained_on(layout: str, drawn: Path, tmp_path: Path) -> None:
    """The published Parquet and older folders have no names of concepts; own shards hold what they were made with."""
    image_of("train")
    data = tmp_path / "data"
    data.mkdir()
    if layout == "sidecars":
        for split, folder in (("train", "train"), ("valid", "validation")):
            as_sidecars(drawn, split, data / folder)
    elif layout == "parquet":
        for split, name in (("train", "train"), ("valid", "validation")):
            as_parquet(drawn, split, data / f"{name}-00000-of-00001.parquet")
    else:
        prepare_data(PrepareSettings(source="rocov2", root=drawn, dev_share=0.2), data, tmp_path / "work")
    (tmp_path / "host").mkdir()
    mounted = Mounted(tmp_path / "host", data)
    # A GPU-less machine's share of shared memory would do for no worker process that used it.
    done = mounted.run("tiny", *LITTLE, "evaluate.batch_size=8", "prepare.dev_share=0.2", options=("--shm-size", "64k"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("no cui_mapping.csv" in done.stderr) == (layout != "shards")
    assert "no pairs of kind" in done.stderr
    assert ("using the prepared shards" in done.stderr) == (layout == "shards")
    registered = json.loads((mounted.logs / "fuselip-rocov2-tiny" / "registered.json").read_text())
    assert registered["version"] == 1


def test_what_can_not_be_trained_on_is_one_sentence(drawn: Path, tmp_path: Path) -> None:
    image_of("train")
    half, host = tmp_path / "half", tmp_path / "host"
    half.mkdir()
    host.mkdir()
    (half / "train-00000-of-00002.parquet").write_bytes(b"PAR1")
    mounted = Mounted(host, half)
    beside = mounted.options[2:]
    readable = ("-v", f"{drawn}:/workspace/ROCOv2_data:ro")
    full = (*readable, "--tmpfs", f"/workspace/models:size=32k,uid={USER}", "-v", f"{mounted.logs}:/workspace/logs")
    of_root = (*readable, "-v", f"{tmp_path}:/workspace/models", "-v", f"{mounted.logs}:/workspace/logs")
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    for options, sentence in (
        (mounted.options, "train-00001-of-00002 is missing"),
        (full, "no space is left on the disk at /workspace/models"),
        (of_root, f"user {USER}:{USER} may not write to /workspace/models"),
        (("-v", f"{hidden}:/workspace/ROCOv2_data:ro", *beside), "can't be read by user"),
    ):
        done = run("bacor_fuselip_train", "tiny", *LITTLE, options=(*CLOSED, *options))
        said = done.stderr.splitlines()
        assert done.returncode == 1 and sentence in said[-1], done.stderr[-3000:]
        assert said[-1].startswith("error: ") and "Traceback" not in done.stderr


def rows_of(drawn: Path, split: str) -> list[tuple[str, str, bytes]]:
    """(id, caption, JPEG) of a split."""
    with zipfile.ZipFile(drawn / f"{split}_images.zip") as archive:
        pictures = {Path(name).stem: archive.read(name) for name in archive.namelist()}
    with (drawn / f"{split}_captions.csv").open(newline="", encoding="utf-8") as stream:
        return [(row["ID"], row["Caption"], pictures[row["ID"]]) for row in csv.DictReader(stream)]


def as_sidecars(drawn: Path, split: str, folder: Path) -> None:
    """The layout of older tools: ID.jpg with ID.jpg.txt."""
    folder.mkdir()
    for name, caption, picture in rows_of(drawn, split):
        (folder / f"{name}.jpg").write_bytes(picture)
        (folder / f"{name}.jpg.txt").write_text(caption, encoding="utf-8")


def as_parquet(drawn: Path, split: str, path: Path) -> Path:
    """The Hub's layout."""
    rows = rows_of(drawn, split)
    images = [{"bytes": picture, "path": f"{name}.jpg"} for name, _, picture in rows]
    columns = {"image": images, "image_id": [row[0] for row in rows], "caption": [row[1] for row in rows]}
    pq.write_table(pa.table({**columns, "cui": [["C0040405"]] * len(rows)}), path)
    return path
