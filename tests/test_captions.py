"""ROCOv2 in its three layouts: the same images and captions come out of each."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuselip_core.data.pair import Listing, fault_of_caption
from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.data.prepare.image_reader import ImageReader
from fuselip_core.data.sources.rocov2 import list_rocov2
from fuselip_core.errors import FuselipError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
COUNTS = {"train": 7, "valid": 3, "test": 4}
PUBLISHED_NAMES = {"train": "train", "valid": "validation", "test": "test"}


@pytest.fixture(scope="module")
def zenodo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zenodo")
    draw_data_set(folder, seed=1, counts=COUNTS)
    return folder


def content(listing: Listing) -> dict[str, tuple[str, bytes, str | None]]:
    """Image id → split, bytes, caption."""
    captions = {pair.query.image: pair.target.text for pair in listing.pairs}
    with ImageReader() as reader:
        return {
            image.image_id: (image.split, reader.read(image.place), captions.get(image.image_id))
            for image in listing.images
        }


def test_zipped_and_extracted_are_the_same(zenodo: Path, tmp_path: Path) -> None:
    zipped = list_rocov2(zenodo)
    assert {split: sum(image.split == split for image in zipped.images) for split in COUNTS} == COUNTS
    assert zipped.images[0].concepts[0].startswith("C")
    assert {image.modality for image in zipped.images} <= {"CT", "MR", "X-ray", "ultrasound"}
    assert all(image.case.startswith("PMC") for image in zipped.images)
    shutil.copytree(zenodo, tmp_path, dirs_exist_ok=True)
    for split in COUNTS:
        with zipfile.ZipFile(tmp_path / f"{split}_images.zip") as archive:
            archive.extractall(tmp_path)
        (tmp_path / f"{split}_images.zip").unlink()
    assert content(list_rocov2(tmp_path)) == content(zipped)


def test_folder_of_older_tools(zenodo: Path, tmp_path: Path) -> None:
    expected = content(list_rocov2(zenodo))
    for name, (split, data, caption) in expected.items():
        folder = tmp_path / PUBLISHED_NAMES[split]
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jpg").write_bytes(data)
        (folder / f"{name}.jpg.txt").write_text(f"{caption}\n", encoding="utf-8")
    (tmp_path / "train" / "without.jpg").write_bytes(b"")
    (tmp_path / "train" / "alone.jpg.txt").write_text("a caption whose picture is lost")
    twin = next(name for name, (split, _, _) in expected.items() if split == "train")
    (tmp_path / "train" / f"{twin}.png").write_bytes(b"another picture of that name")
    (tmp_path / "train" / f"{twin}.png.txt").write_text("another caption")
    listing = list_rocov2(tmp_path)
    assert content(listing) == expected
    found = {item.id: item.reason for item in listing.set_aside}
    assert found == {"without": "missing_caption", "alone.jpg": "missing_image", twin: "repeated_id"}


def test_parquet_of_the_hub(zenodo: Path, tmp_path: Path) -> None:
    expected = content(list_rocov2(zenodo))
    (tmp_path / "data").mkdir()
    for split, name in PUBLISHED_NAMES.items():
        rows = [
            {"image": {"bytes": data, "path": f"{key}.jpg"}, "image_id": key, "caption": caption, "cui": ["C0040405"]}
            for key, (part, data, caption) in expected.items()
            if part == split
        ]
        # Small row groups, as large files have many.
        pq.write_table(
            pa.Table.from_pylist(rows), tmp_path / "data" / f"{name}-00000-of-00001.parquet", row_group_size=2
        )
    listing = list_rocov2(tmp_path)
    assert content(listing) == expected
    assert "these files have no articles" in listing.notes[0]
    shutil.copy(zenodo / "license_information.csv", tmp_path)
    listing = list_rocov2(tmp_path)
    assert not listing.notes and all(image.case.startswith("PMC") for image in listing.images)
    assert {image.modality for image in listing.images} == {"CT"}
    with ImageReader() as reader:  # a shard may begin in the middle of a file
        last = [image for image in listing.images if image.split == "train"][-1]
        assert reader.read(last.place) == expected[last.image_id][1]


def test_what_does_not_fit_together_is_set_aside(zenodo: Path, tmp_path: Path) -> None:
    shutil.copytree(zenodo, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train_captions.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], *lines[2:], lines[2], "ROCOv2_nowhere,A caption"]), encoding="utf-8")
    listing = list_rocov2(tmp_path)
    lost = lines[1].split(",")[0]
    questions = [(item.id, item.reason) for item in listing.set_aside if "/question-" in item.id]
    assert questions == [(f"{lost}/question-{number}", "missing_image") for number in range(1, 5)]
    assert [(item.id, item.reason) for item in listing.set_aside if "/question-" not in item.id] == [
        (lines[2].split(",")[0], "repeated_id"),
        ("ROCOv2_nowhere", "missing_image"),
        (lines[1].split(",")[0], "missing_caption"),
    ]


def test_pictures_that_share_a_name_are_not_lost_in_silence(zenodo: Path, tmp_path: Path) -> None:
    shutil.copytree(zenodo, tmp_path, dirs_exist_ok=True)
    with zipfile.ZipFile(tmp_path / "test_images.zip", "a") as archive:
        name = next(iter(archive.namelist()))
        archive.writestr(f"{Path(name).with_suffix('.png')}", b"another")
    assert [(item.id, item.reason) for item in list_rocov2(tmp_path).set_aside] == [(Path(name).stem, "repeated_id")]


def test_members_that_would_leave_their_folder_are_not_read(zenodo: Path, tmp_path: Path) -> None:
    shutil.copytree(zenodo, tmp_path, dirs_exist_ok=True)
    with zipfile.ZipFile(tmp_path / "test_images.zip", "a") as archive:
        archive.writestr("../../evil.jpg", b"x")
        archive.writestr("__MACOSX/test/._a.jpg", b"x")
    # The hostile member is set aside under its name; what a Mac adds to archives is no picture at all.
    refused = list_rocov2(tmp_path).set_aside
    assert len(refused) == 1 and "evil" in str(refused[0])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: shutil.rmtree(root), "no folder"),
        (lambda root: [path.unlink() for path in root.iterdir()], "is empty"),
        (lambda root: [path.unlink() for path in root.glob("*.csv")], "no known layout"),
        (lambda root: (root / "valid_images.zip").unlink(), "neither valid_images.zip nor a folder valid"),
        (lambda root: (root / "valid_images.zip").write_bytes(b"PK broken"), "not a readable zip archive"),
        (lambda root: (root / "test_captions.csv").write_text("ID,Text\n1,2\n"), "lacks the column Caption"),
        (lambda root: (root / "test_captions.csv").write_bytes(b"ID,Caption\n1,\xff\n"), "not UTF-8"),
        (lambda root: (root / "license_information.csv").write_text(""), "license_information.csv is empty"),
        (lambda root: (root / "test_captions.csv").write_bytes(POINTER), "Git LFS"),
        (lambda root: (root / "test_images.zip").write_bytes(POINTER), "Git LFS"),
    ],
)
def test_an_unusable_folder_is_one_sentence(zenodo: Path, tmp_path: Path, spoil: object, said: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(zenodo, root)
    spoil(root)  # type: ignore[operator]
    with pytest.raises(FuselipError, match=said) as raised:
        list_rocov2(root)
    assert "\n" not in str(raised.value) and str(root) in str(raised.value)


def test_a_bad_row_of_a_table_costs_no_other(zenodo: Path, tmp_path: Path) -> None:
    shutil.copytree(zenodo, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train_captions.csv"
    names = [line.split(",")[0] for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    long = "nodule " * 30_000
    texts = ["nodule, left lung, 5 mm", long, '"never closes', *(f"caption {name}" for name in names[3:])]
    rows = [f"{name},{text}" for name, text in zip(names, texts, strict=True)]
    path.write_text("\n".join(["ID, Caption", *rows]), encoding="utf-8")
    listing = list_rocov2(tmp_path)
    captions = {pair.query.image: pair.target.text for pair in listing.pairs if pair.kind == "caption"}
    assert {names[1]: long.strip()}.items() <= captions.items()
    assert all(captions[name] == f"caption {name}" for name in names[3:])
    assert [(item.id, item.reason) for item in listing.set_aside if item.reason == "bad_row"] == [
        ("train_captions.csv:2", "bad_row"),
        ("train_captions.csv:4", "bad_row"),
    ]


def test_questions_are_read_wherever_they_lie(zenodo: Path, tmp_path: Path) -> None:
    shutil.copytree(zenodo, tmp_path, dirs_exist_ok=True)
    expected = sorted(map(str, list_rocov2(tmp_path).pairs))
    assert sum("kind='vqa'" in pair for pair in expected) == 4 * sum(COUNTS.values())
    (tmp_path / "extra").mkdir()
    for split in COUNTS:
        (tmp_path / f"{split}_questions.csv").rename(tmp_path / "extra" / f"{split}_questions.csv")
    assert sorted(map(str, list_rocov2(tmp_path).pairs)) == expected


def test_brain_mri_has_its_questions(shared: Path) -> None:
    listing = list_rocov2(shared / "data" / "brain-mri-rocov2")
    assert sum(pair.kind == "vqa" for pair in listing.pairs) == 8_220
    assert len(listing.images) == 2_740 and not listing.set_aside


def write_roco_1(root: Path) -> None:
    for split in ("train", "validation", "test"):
        for part in ("radiology", "non-radiology"):
            folder = root / "data" / split / part
            (folder / "images").mkdir(parents=True)
            for number in range(3):
                (folder / "images" / f"PMC{number}_x-g{number}.jpg").write_bytes(f"{split} {number}".encode())
            texts = (f"ROCO_{number}\t A text {split} {number}, with a comma\n" for number in (0, 1, 3))
            (folder / "captions.txt").write_text("".join(texts))
            links = (f"ROCO_{number}\twget -r ftp://x\tPMC{number}_x-g{number}.jpg\n" for number in range(4))
            (folder / "dlinks.txt").write_text("".join(links))
            (folder / "licences.txt").write_text("ROCO_0\tPMC77\tCC BY\nno tab here\n")


def test_roco_version_1_is_joined_through_its_tables(tmp_path: Path) -> None:
    write_roco_1(tmp_path)
    listing = list_rocov2(tmp_path)
    assert "ROCO version 1" in listing.notes[0]
    assert sorted((image.split, image.image_id, image.case, image.licence) for image in listing.images) == [
        (split, *row)
        for split in ("test", "train", "valid")
        for row in (("ROCO_0", "PMC77", "CC BY"), ("ROCO_1", "PMC1", None))
    ]
    captions = {(pair.split, pair.query.image): pair.target.text for pair in listing.pairs}
    assert captions["valid", "ROCO_1"] == "A text validation 1, with a comma"
    with ImageReader() as reader:
        read = {(image.split, image.image_id): reader.read(image.place) for image in listing.images}
    assert read["test", "ROCO_1"] == b"test 1"
    reasons = [(item.id, item.reason) for item in listing.set_aside if item.split == "test"]
    assert reasons == [
        ("licences.txt:2", "bad_row"),
        ("ROCO_3", "missing_image"),
        ("PMC2_x-g2.jpg", "missing_caption"),
    ]
    shutil.rmtree(tmp_path / "data" / "train" / "radiology" / "images")
    with pytest.raises(FuselipError, match="no folder images"):
        list_rocov2(tmp_path)


def test_linked_image_folders_are_read(zenodo: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(zenodo, root)
    with zipfile.ZipFile(root / "train_images.zip") as archive:
        archive.extractall(tmp_path / "far")
    (root / "train_images.zip").unlink()
    (root / "train").mkdir()
    (root / "train" / "linked").symlink_to(tmp_path / "far")
    listing = list_rocov2(root)
    assert sum(image.split == "train" for image in listing.images) == COUNTS["train"] and not listing.set_aside


def test_placeholders_are_told_from_short_captions(shared: Path) -> None:
    for caption in (
        "Replace this - DESCRIPTION OF THE IMAGE OR FINDINGS.",
        "IN PROGRESS.",
        "n/a",
        "-",
        "...",
        "No caption",
    ):
        assert fault_of_caption(caption, 1) == "placeholder_caption", caption
    assert fault_of_caption(" \t", 0) == "empty_caption"
    assert fault_of_caption("Chest", 2) == "short_caption"
    assert fault_of_caption("胸部CT", 1) is None
    real = (shared / "data" / "roco-captions" / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert [caption for caption in real if fault_of_caption(caption, 1)] == []
