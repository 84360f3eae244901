"""Every source from small files in exactly its published format, to prepared shards."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from instructions import obey
from PIL import Image

from fuselip_core.config import PrepareSettings
from fuselip_core.data.inspect.page import inspect_data
from fuselip_core.data.pair import DataError, Listing
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.sources.catalogue import list_source, source_names
from fuselip_core.data.sources.rocov2 import PUBLISHED_COUNTS, list_rocov2


def picture(seed: int, width: int = 40, height: int = 30) -> np.ndarray:
    """A picture with large shapes, which no two seeds share."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(seed: int, kind: str = "JPEG", **size: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(seed, **size)).save(stream, kind)
    return stream.getvalue()


def prepare(source: str, root: Path, out: Path, **changes: object) -> tuple[dict[str, Any], PreparedData]:
    fields = {"source": source, "root": root, "workers": 1, "most_set_aside": 1.0, **changes}
    settings = PrepareSettings.model_validate(fields)
    return prepare_data(settings, out), PreparedData(out)


def images_of(prepared: PreparedData, split: str) -> dict[str, Image.Image]:
    rows = [row for batch in prepared.iter_images(split) for row in batch.to_pylist()]
    return {row["image_id"]: Image.open(io.BytesIO(row["bytes"])) for row in rows}


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# ---- image-text pairs from the web -----------------------------------------------------------------------------------


def web_sample(number: int, caption: str) -> dict[str, bytes]:
    key = f"{number:08d}"
    about = {"caption": caption, "key": key, "status": "success", "url": f"http://pictures.example/{key}"}
    return {f"{key}.jpg": encoded(number), f"{key}.json": json.dumps(about).encode(), f"{key}.txt": caption.encode()}


def test_webdataset(tmp_path: Path) -> None:
    root = tmp_path / "cc3m"
    root.mkdir()
    for shard in range(2):
        members = {}
        for number in range(3):
            members |= web_sample(10 * shard + number, f"Übersicht {shard} von {number} 日本語")
        write_tar(root / f"cc3m-train-000{shard}.tar", members)
    without_text = {"00000091.jpg": encoded(91), "00000092.txt": b"no picture", "../00000093.jpg": encoded(93)}
    write_tar(root / "cc3m-validation-0000.tar", {**web_sample(90, "a dog"), **without_text})
    manifest, prepared = prepare("cc3m", root, tmp_path / "out", rows_per_shard=4)
    assert {split: prepared.image_count(split) for split in prepared.splits} == {"train": 6, "valid": 1}
    assert manifest["quarantine"] == {"missing_caption": 1, "missing_image": 1, "unsafe_member": 1}
    first = next(prepared.iter_images("train")).to_pylist()[1]
    assert first["image_id"] == "cc3m-train-0000/00000001" and first["bytes"] == encoded(1)
    assert first["attribution"] == "http://pictures.example/00000001"
    assert prepared.pairs("train")["target_text"].to_pylist()[1] == "Übersicht 0 von 1 日本語"


def texts_of(listing: Listing) -> dict[str | None, tuple[str, str | None]]:
    """Image → split and caption."""
    assert len({image.image_id for image in listing.images}) == len(listing.images) == len(listing.pairs)
    return {pair.query.image: (pair.split, pair.target.text) for pair in listing.pairs}


def test_archives_of_one_name_in_several_folders(tmp_path: Path) -> None:
    """img2dataset numbers its archives from 0 in every folder: keys are told apart, folders are splits."""
    root = tmp_path / "root"
    for folder in ("part1", "part2", "val", "validation/a", "test"):
        (root / folder).mkdir(parents=True)
        write_tar(root / folder / "00000.tar", web_sample(0, f"of {folder}"))
    (tmp_path / "far").mkdir()
    write_tar(tmp_path / "far" / "00000.tar", web_sample(0, "of far"))
    (root / "linked").symlink_to(tmp_path / "far")
    listing = list_source("cc3m", root)
    assert texts_of(listing) == {
        "linked/00000/00000000": ("train", "of far"),
        "part1/00000/00000000": ("train", "of part1"),
        "part2/00000/00000000": ("train", "of part2"),
        "test/00000/00000000": ("test", "of test"),
        "val/00000/00000000": ("valid", "of val"),
        "validation/a/00000/00000000": ("valid", "of validation/a"),
    }
    assert not listing.set_aside


def test_every_member_of_an_archive_is_accounted_for(tmp_path: Path) -> None:
    """A key twice, two images of a key, a mask between image and text, long texts and other files."""
    members = [
        ("a.jpg", encoded(1)), ("a.txt", b"first"),
        ("b.jpg", encoded(2)), ("b.png", encoded(3)), ("b.seg.png", encoded(4)), ("b.cls", b"7"), ("b.txt", b"second"),
        ("a.jpg", encoded(5)), ("a.txt", b"again"),
        ("c.jpg", encoded(6)), ("c.txt", b"x" * (1 << 20) + b"x"),
        ("1.5mm.jpg", encoded(7)), ("1.5mm.txt", b"third"), ("1.6mm.jpg", encoded(8)), ("1.6mm.txt", b"fourth"),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    listing = list_source("cc12m", tmp_path)
    captions = {name: text for name, (_, text) in texts_of(listing).items()}
    assert captions == {"t/a": "first", "t/b": "second", "t/1.5mm": "third", "t/1.6mm": "fourth"}
    assert [(item.id, item.reason) for item in listing.set_aside] == [
        ("t/b", "repeated_id"),
        ("t/b.seg", "missing_caption"),
        ("t/a", "repeated_id"),
        ("t/c", "long_text"),
        ("t/c", "missing_caption"),
    ]
    assert listing.notes == ["t.tar has members that are neither images nor texts and were ignored: 1 .cls"]


def test_a_pointer_of_git_lfs_in_place_of_an_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="Git LFS"):
        list_source("cc3m", tmp_path)


def test_a_truncated_archive_gives_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "cc12m-train-0000.tar"
    members: dict[str, bytes] = {}
    for number in range(4):
        members |= web_sample(number, f"caption {number}")
    write_tar(path, members)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    listing = list_source("cc12m", tmp_path)
    assert 0 < len(listing.images) < 4
    assert [item.reason for item in listing.set_aside][-1] == "damaged_archive"


def test_tables_of_paths(tmp_path: Path) -> None:
    root = tmp_path / "tables"
    (root / "images").mkdir(parents=True)
    for number in range(3):
        (root / "images" / f"{number}.jpg").write_bytes(encoded(number))
    rows = [(f"images/{number}.jpg", f'a "quoted", caption {number}') for number in range(3)]
    write_csv(root / "train.csv", ("path", "caption"), [*rows, rows[0], ("../outside.jpg", "x"), ("/etc/passwd", "y")])
    manifest, prepared = prepare("cc3m", root, tmp_path / "captions")
    assert manifest["quarantine"] == {"outside_folder": 2, "repeated_id": 1}
    assert prepared.pairs("train")["target_text"][2].as_py() == 'a "quoted", caption 2'
    questions = [
        ("images/0.jpg", "Is it red?", "Yes"),
        ("images/0.jpg", "What?", "A dog"),
        ("images/9.jpg", "Who?", "I"),
    ]
    write_csv(root / "train.csv", ("path", "question", "answer"), [*questions, ("images/1.jpg", "", "No")])
    manifest, prepared = prepare("cc3m-vqa", root, tmp_path / "questions")
    assert manifest["quarantine"] == {"empty_question": 1, "missing_image": 1}
    pairs = prepared.pairs("train").to_pylist()
    assert [(pair["query_text"], pair["target_text"], pair["answer_type"]) for pair in pairs] == [
        ("Is it red?", "yes", "closed"),
        ("What?", "a dog", "open"),
    ]
    assert prepared.image_count("train") == 1


def test_every_kind_of_picture_in_an_archive_and_an_empty_path(tmp_path: Path) -> None:
    (tmp_path / "tar").mkdir()
    members = {f"{kind}.{kind}": encoded(7, kind.upper()) for kind in ("gif", "bmp", "tiff", "png", "webp")}
    write_tar(
        tmp_path / "tar" / "cc3m-train-0000.tar",
        {
            key: data
            for name, image in members.items()
            for key, data in ((name, image), (f"{name[:-4].strip('.')}.txt", b"a cat"))
        },
    )
    assert len(list_source("cc3m", tmp_path / "tar").images) == 5
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("path,caption\n,nothing\na.jpg,a cat\n")
    assert [item.reason for item in list_source("cc3m", tmp_path / "table").set_aside] == ["empty_path"]


def test_hq_edit(tmp_path: Path) -> None:
    root = tmp_path / "hq"
    (root / "data").mkdir(parents=True)
    rows = [
        {
            "input": f"a street {number}",
            "edit": f"add snow {number}",
            "inverse_edit": f"remove snow {number}",
            "output": f"a street in snow {number}",
            "input_image": {"bytes": encoded(2 * number, "PNG"), "path": None},
            "output_image": {"bytes": encoded(2 * number + 1, "PNG"), "path": None},
        }
        for number in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    manifest, prepared = prepare("hq-edit", root, tmp_path / "out", rows_per_shard=3)
    assert manifest["counts"]["train"] == {"images": 10, "cases": 5, "pairs": {"edit": 15}}
    groups = Counter(prepared.pairs("train")["group"].to_pylist())
    assert sorted(groups.values()) == [1] * 5 + [2] * 5
    stored = images_of(prepared, "train")
    for number, row in enumerate(rows):
        forward, backward, described = prepared.pairs("train").to_pylist()[3 * number : 3 * number + 3]
        assert (forward["query_text"], forward["target_text"]) == (row["edit"], None)
        assert (backward["query_text"], backward["target_image"]) == (row["inverse_edit"], forward["query_image"])
        assert (described["query_text"], described["target_text"]) == (row["edit"], row["output"])
        assert described["target_image"] == forward["target_image"] == backward["query_image"]
        assert np.array_equal(np.asarray(stored[forward["query_image"]]), picture(2 * number))
        assert np.array_equal(np.asarray(stored[forward["target_image"]]), picture(2 * number + 1))


def region(number: int, image: int, box: tuple[int, int, int, int], phrase: str = "a thing") -> dict[str, Any]:
    x, y, width, height = box
    return {"region_id": number, "image_id": image, "phrase": phrase, "x": x, "y": y, "width": width, "height": height}


def test_visual_genome(tmp_path: Path) -> None:
    root = tmp_path / "vg"
    for folder, number in (("VG_100K", 1), ("VG_100K_2", 2), ("VG_100K_2", 3)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{number}.jpg").write_bytes(encoded(number, width=120, height=100))
    boxes = [(0, 0, 40, 40), (80, 60, 60, 60), (10, 20, 50, 60), (5, 5, 90, 90), (30, 30, 33, 33)]
    train = [{"id": 1, "regions": [region(10 + i, 1, box, f"phrase {i}") for i, box in enumerate(boxes)]}]
    train[0]["regions"].append(region(19, 1, (0, 0, 32, 90)))
    test = [{"id": 2, "regions": [region(20, 2, boxes[0])]}, {"id": 9, "regions": [region(90, 9, boxes[0])]}]
    (root / "region_descriptions_train.json").write_text(json.dumps(train))
    (root / "region_descriptions_test.json").write_text(json.dumps(test))
    asked = [{"qa_id": 10 * i, "image_id": i, "question": f"What {i}?", "answer": "A Dog."} for i in (1, 2, 3, 1, 1, 1)]
    (root / "question_answers.json").write_text(json.dumps([{"id": 1, "qas": asked}]))
    manifest, prepared = prepare("visual-genome", root, tmp_path / "out")
    assert manifest["counts"]["train"]["pairs"] == {"region": 5, "vqa": 5}
    assert manifest["counts"]["test"]["pairs"] == {"region": 1, "vqa": 1}
    assert manifest["quarantine"] == {"missing_image": 1}
    assert any(note.startswith("1 regions were left out") for note in manifest["notes"])
    regions = [pair for pair in prepared.pairs("train").to_pylist() if pair["kind"] == "region"]
    assert sorted(Counter(pair["group"] for pair in regions).values()) == [1, 4]
    original = Image.open(root / "VG_100K" / "1.jpg")
    for pair, (x, y, width, height) in zip(regions, boxes, strict=True):
        cut = original.crop((x, y, min(120, x + width), min(100, y + height)))
        assert pair["query_image"] == "1"
        assert np.array_equal(np.asarray(images_of(prepared, "train")[pair["target_image"]]), np.asarray(cut))
    assert set(prepared.pairs("test")["target_text"].to_pylist()) == {None, "a dog"}


def test_slake(tmp_path: Path) -> None:
    root = tmp_path / "slake"
    for split, number in (("train", 1), ("validate", 2), ("test", 3)):
        folder = root / "imgs" / f"xmlab{number}"
        folder.mkdir(parents=True)
        (folder / "source.jpg").write_bytes(encoded(number))
        row = {"img_id": number, "img_name": f"xmlab{number}/source.jpg", "location": "Lung", "modality": "MRI"}
        row |= {"base_type": "vqa", "content_type": "Modality", "triple": ["vhead", "_", "_"]}
        asked = [
            {**row, "qid": 10 * number, "question": "What modality?", "answer": "MRI", "q_lang": "en"},
            {**row, "qid": 10 * number + 1, "question": "这是什么?", "answer": "肺", "q_lang": "zh"},
        ]
        (root / f"{split}.json").write_text(json.dumps([{**item, "answer_type": "OPEN"} for item in asked]))
    manifest, prepared = prepare("slake", root, tmp_path / "out")
    assert prepared.splits == ("train", "valid", "test")
    assert [prepared.manifest["counts"][split]["pairs"]["vqa"] for split in prepared.splits] == [1, 1, 1]
    assert prepared.pairs("valid").to_pylist()[0]["target_text"] == "mri"
    assert next(prepared.iter_images("test", ["modality"])).to_pylist() == [{"modality": "MR"}]
    assert "3 questions in other languages (zh) were ignored" in manifest["notes"]
    _as_on_the_hub(root)
    zipped, same = prepare("slake", root, tmp_path / "zipped")
    assert zipped["counts"] == manifest["counts"] and zipped["quarantine"] == {"unsafe_member": 1}
    assert same.pairs("valid").equals(prepared.pairs("valid"))


def _as_on_the_hub(root: Path) -> None:
    """The pictures in one archive, which also holds what must not be read, and the list by its other name."""
    with zipfile.ZipFile(root / "imgs.zip", "w") as archive:
        for path in sorted((root / "imgs").rglob("*.jpg")):
            archive.write(path, path.relative_to(root))
        archive.writestr("../outside.jpg", encoded(9))
    shutil.rmtree(root / "imgs")
    (root / "validate.json").rename(root / "validation.json")


# ---- evaluation sets -------------------------------------------------------------------------------------------------


def test_open_images_lists_as_published(shared: Path, tmp_path: Path) -> None:
    """The published lists, with pictures for their first entries."""
    root = tmp_path / "oi"
    (root / "test").mkdir(parents=True)
    sides = ("XMin", "YMin", "XMax", "YMax")
    for name in ("oi-crop.json", "oi-crop-positional-v3.json"):
        (root / name).symlink_to(shared / "data" / "fuselip-eval" / name)
    flat = json.loads((root / "oi-crop.json").read_text())["data"][:3]
    birds = json.loads((root / "oi-crop-positional-v3.json").read_text())["data"]["Bird"][:2]
    names = {sample["ImageID"] for entry in (*flat, *birds) for sample in entry["retrieval_samples"]}
    for number, name in enumerate(sorted(names)):
        (root / "test" / name).write_bytes(encoded(number, width=1024, height=1024))
    manifest, prepared = prepare("open-images", root, tmp_path / "out")
    assert manifest["counts"]["test"]["candidates"]["oi-crop"] == 3
    assert manifest["counts"]["test"]["candidates"]["oi-pos"] >= 2
    assert manifest["quarantine"]["missing_image"] > 3000
    stored = images_of(prepared, "test")
    options = prepared.options("test")
    for row, entry in zip(prepared.candidates("test", "oi-crop").to_pylist(), flat, strict=True):
        assert (row["query_image"], row["query_text"]) == (entry["query_img"], entry["query_target"])
        assert len(options[row["options"]]) == 10
        box = entry["retrieval_samples"][0]["bbox"]
        edges = [min(1024, round(box[side])) for side in sides]
        right = np.asarray(stored[options[row["options"]][row["answer"]].image or ""])
        whole = Image.open(root / "test" / entry["retrieval_samples"][0]["ImageID"])
        cut = whole.crop((edges[0], edges[1], edges[2], edges[3]))
        assert np.array_equal(right, np.asarray(cut))
    assert len({row["answer"] for row in prepared.candidates("test").to_pylist()}) > 1, "not always the first"


def test_sugarcrepe_lists_as_published(shared: Path, tmp_path: Path) -> None:
    root = tmp_path / "crepe"
    (root / "val2017").mkdir(parents=True)
    (root / "sugarcrepe").symlink_to(shared / "data" / "fuselip-eval" / "sugarcrepe")
    first = json.loads((root / "sugarcrepe" / "swap_obj.json").read_text())["0"]
    (root / "val2017" / first["filename"]).write_bytes(encoded(1))
    manifest, prepared = prepare("sugarcrepe", root, tmp_path / "out")
    assert manifest["counts"]["test"]["candidates"]["sugarcrepe/swap_obj"] == 1
    row = prepared.candidates("test", "sugarcrepe/swap_obj").to_pylist()[0]
    sides = prepared.options("test", {row["options"]})[row["options"]]
    assert sides[row["answer"]].text == first["caption"]
    assert sides[1 - row["answer"]].text == first["negative_caption"]
    assert len(list_source("sugarcrepe", root).set_aside) > 7000


def test_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    names = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane"}
    for number, synset in enumerate(names):
        (root / "val" / synset).mkdir(parents=True)
        for copy in range(2):
            path = root / "val" / synset / f"ILSVRC2012_val_{10 * number + copy:08d}.JPEG"
            path.write_bytes(encoded(10 * number + copy))
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{key} {value}\n" for key, value in names.items()))
    manifest, prepared = prepare("imagenet", root, tmp_path / "out")
    options = prepared.options("test")
    assert len(options) == 1 and {side.text for side in next(iter(options.values()))} == {"tench", "crane"}
    rows = prepared.candidates("test").to_pylist()
    assert [options[row["options"]][row["answer"]].text for row in rows] == ["tench"] * 2 + ["crane"] * 4
    assert any("1 of 3 classes" in note for note in manifest["notes"])


def test_mmeb(tmp_path: Path) -> None:
    root = tmp_path / "mmeb"
    subsets = {
        "VOC2007": [("<|image_1|>\nIdentify the object", "VOC2007/0.jpg", ["cat", "dog", "cat"], ["", "", ""])],
        "MSCOCO_t2i": [("Find: a cat", "", ["<|image_1|>\nthe image"] * 2, ["MSCOCO/1.jpg", "MSCOCO/2.jpg"])],
        "CIRR": [("<|image_1|>\nwith snow", "CIRR/3.jpg", ["<|image_1|>\nit"] * 2, ["CIRR/4.jpg", "CIRR/gone.jpg"])],
    }
    for name, rows in subsets.items():
        (root / name).mkdir(parents=True)
        table = [dict(zip(("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"), row, strict=True)) for row in rows]
        pq.write_table(pa.Table.from_pylist(table), root / name / "test-00000-of-00001.parquet")
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for number, name in enumerate(("VOC2007/0", "MSCOCO/1", "MSCOCO/2", "CIRR/3", "CIRR/4", "../out")):
            archive.writestr(f"{name}.jpg", encoded(number))
    manifest, prepared = prepare("mmeb-eval", root, tmp_path / "out")
    assert manifest["counts"]["test"]["candidates"] == {"mmeb/MSCOCO_t2i": 1, "mmeb/VOC2007": 1}
    assert manifest["quarantine"] == {"missing_image": 1, "unsafe_member": 1}
    voc, coco = (prepared.candidates("test", f"mmeb/{name}").to_pylist()[0] for name in ("VOC2007", "MSCOCO_t2i"))
    options = prepared.options("test")
    assert (voc["query_image"], voc["query_text"]) == ("VOC2007/0.jpg", "Identify the object")
    assert len(options[voc["options"]]) == 2, "equal options count once"
    assert options[voc["options"]][voc["answer"]].text == "cat"
    assert options[coco["options"]][coco["answer"]].image == "MSCOCO/1.jpg" and coco["query_image"] is None


def test_transformations_of_the_published_rows(shared: Path, tmp_path: Path) -> None:
    root = tmp_path / "tgit"
    root.mkdir()
    (root / "tgit-indices.txt").write_text("[2, 0, 7]")
    members: dict[str, bytes] = {}
    for number in range(4):
        members |= web_sample(number, f"caption {number}")
    write_tar(root / "cc3m-validation-0000.tar", members)
    manifest, prepared = prepare("tgit", root, tmp_path / "out")
    assert manifest["quarantine"] == {"missing_image": 1}
    families = ("crop", "rotate", "colour", "flip", "colorize")
    assert manifest["counts"]["test"]["candidates"] == {f"tgit/{family}": 2 for family in sorted(families)}
    stored = {name: np.asarray(image.convert("RGB")) for name, image in images_of(prepared, "test").items()}
    options = prepared.options("test")
    sizes = {"crop": 9, "rotate": 18, "colour": 10, "flip": 3, "colorize": 2}
    for row in prepared.candidates("test").to_pylist():
        family = row["task"].removeprefix("tgit/")
        assert len(options[row["options"]]) == sizes[family]
        right = stored[options[row["options"]][row["answer"]].image or ""]
        query = stored[row["query_image"]]
        if row["query_text"] == "colorize":
            assert np.array_equal(query, obey(right, "grayscale")) and not np.array_equal(query, right)
        else:
            assert np.array_equal(right, obey(query, row["query_text"]))
    inspect_data(tmp_path / "out", tmp_path / "look", samples=1)
    page = (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
    assert "tgit/crop, 1 of 9" in page and page.count("<img") == 2 * len(families)
    published = json.loads((shared / "data" / "fuselip-eval" / "tgit-indices.txt").read_text())
    assert len(published) >= 1000


# ---- all -------------------------------------------------------------------------------------------------------------


def test_text_and_names_that_utf_8_does_not_have(tmp_path: Path) -> None:
    """Half of a surrogate pair in a JSON list, and a file name in another encoding: neither ends a run."""
    roco, crepe = tmp_path / "roco", tmp_path / "crepe"
    for folder in (roco / "train", crepe):
        folder.mkdir(parents=True)
    for number, name in enumerate((b"M\xfcller", b"M\xfdller", "Ελληνικά".encode())):
        base = os.fsencode(roco / "train") + b"/" + name
        Path(os.fsdecode(base + b".jpg")).write_bytes(encoded(number))
        Path(os.fsdecode(base + b".jpg.txt")).write_text("胸部 صورة рентген \U0001fac1", encoding="utf-8")
    (crepe / "a.jpg").write_bytes(encoded(1))
    text = '{"0": {"filename": "a.jpg", "caption": "a \\ud83d b", "negative_caption": "\\ud83d\\ude00 c"}}'
    (crepe / "add_att.json").write_text(text)
    _, prepared = prepare("rocov2", roco, tmp_path / "out", min_caption_words=1)
    rows = prepared.pairs("train").to_pylist()
    assert {row["query_image"] for row in rows} == {"M\\udcfcller", "M\\udcfdller", "Ελληνικά"}
    assert {row["target_text"] for row in rows} == {"胸部 صورة рентген \U0001fac1"}
    _, prepared = prepare("sugarcrepe", crepe, tmp_path / "asked")
    (options,) = prepared.options("test").values()
    assert {side.text for side in options} == {"a \\ud83d b", "\U0001f600 c"}
    inspect_data(tmp_path / "out", tmp_path / "look", samples=3)
    assert "Ελληνικά" in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", sorted(source_names()))
def test_a_folder_of_something_else_is_one_sentence(source: str, tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(DataError) as raised:
        list_source(source, tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("source", "name", "content"),
    [
        ("open-images", "oi-crop.json", {"rows": []}),
        ("open-images", "oi-crop.json", {"data": [{"query_img": "a.jpg"}]}),
        ("sugarcrepe", "add_att.json", {"0": {"file": "a.jpg"}}),
        ("visual-genome", "question_answers.json", [{"id": 1}]),
        ("visual-genome", "region_descriptions.json", [[]]),
        ("tgit", "tgit-indices.txt", {"rows": [1]}),
    ],
)
def test_tables_of_another_form_are_one_sentence(source: str, name: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"differ from the published form|does not contain a list"):
        list_source(source, tmp_path)


def test_the_hub_counts_are_compared_with_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuselip_core.data.sources.rocov2.PUBLISHED_COUNTS", {"train": 1_580, "valid": 90, "test": 99})
    counts = {"train": 1_584, "validation": 90, "test": 5}
    for split, count in counts.items():
        ids = [f"ROCOv2_2023_{split}_{number:06d}" for number in range(count)]
        empty = pa.array([{"bytes": b"", "path": None}] * count)
        columns = {"image": empty, "image_id": ids, "caption": ["a scan"] * count, "cui": [["C0040405"]] * count}
        pq.write_table(pa.table(columns), tmp_path / f"{split}-00000-of-00001.parquet")
    assert list_rocov2(tmp_path).notes[1:] == [
        "train has 1,584 images, +4 compared with the published 1,580",
        "valid has 90 images, as published",
    ]
    assert PUBLISHED_COUNTS["train"] == 59_958, "Rückert et al. 2024"
