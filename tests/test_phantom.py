"""The embedded sample: same bytes from the same seed, ROCOv2's layout, and pictures that show what captions tell."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuselip_core.data.phantom import data_set
from fuselip_core.data.phantom.anatomy import STUDIES, Lesion, Scene, draw
from fuselip_core.data.phantom.canvas import LEFT, RIGHT
from fuselip_core.data.phantom.data_set import draw_case, draw_data_set

COUNTS = {"train": 9, "valid": 3, "test": 5}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    draw_data_set(folder, seed=3, counts=COUNTS)
    return folder


def test_same_seed_same_bytes_with_any_number_of_workers(sample: Path, tmp_path: Path) -> None:
    draw_data_set(tmp_path / "again", seed=3, counts=COUNTS, workers=2)
    draw_data_set(tmp_path / "other", seed=4, counts=COUNTS)
    assert digest(sample) == digest(tmp_path / "again")
    changed = {name for name, value in digest(sample).items() if digest(tmp_path / "other")[name] != value}
    assert changed >= {
        f"{split}_{what}" for split in COUNTS for what in ("images.zip", "captions.csv", "questions.csv")
    }


def test_pixels_do_not_depend_on_the_machine() -> None:
    """The hash was taken once; a machine that rounds otherwise, or a NumPy whose random stream moved, shows here."""
    total = hashlib.sha256()
    for number, study in enumerate(STUDIES):
        scene = Scene(
            *study.split("-"), finding=number % 2 == 0, bright=number % 3 == 0, lesions=(Lesion(LEFT, 1, 22),)
        )
        total.update(draw(scene, 130, 120, np.random.default_rng(number)).tobytes())
    assert total.hexdigest() == "8250d5afa6cd1cf82d736f873e25b5d5e904f572855f6b8ae53dbc0497cf6b4f"


def test_layout_is_the_published_one(sample: Path, shared: Path) -> None:
    published = shared / "data" / "medpix-rocov2"
    for path in sorted(published.glob("*.csv")):
        ours = (sample / path.name).read_text(encoding="utf-8").splitlines()[0]
        assert ours == path.read_text(encoding="utf-8").splitlines()[0], path.name
    for split, count in COUNTS.items():
        with zipfile.ZipFile(sample / f"{split}_images.zip") as archive:
            members = archive.namelist()
            images = [Image.open(io.BytesIO(archive.read(member))) for member in members]
        assert members == [f"{split}/{row['ID']}.jpg" for row in rows(sample / f"{split}_captions.csv")]
        assert len(members) == count
        assert {(image.format, image.mode) for image in images} == {("JPEG", "L")}


def test_concepts_are_in_the_mapping_and_cases_on_one_side(sample: Path) -> None:
    known = {row["CUI"] for row in rows(sample / "cui_mapping.csv")}
    case_of = {row["ID"]: row["PMCID"] for row in rows(sample / "license_information.csv")}
    splits_of_case = defaultdict(set)
    for split in COUNTS:
        for row in rows(sample / f"{split}_concepts.csv"):
            assert set(row["CUIs"].split(";")) <= known
            splits_of_case[case_of[row["ID"]]].add(split)
    assert len(case_of) == sum(COUNTS.values())
    assert all(len(splits) == 1 for splits in splits_of_case.values())


def centre_of_change(scene: Scene, seed: int) -> tuple[float, float, float]:
    """Column and row (0..1) and number of the pixels that the lesions of a scene change."""
    without = Scene(scene.modality, scene.region, scene.finding, scene.bright, ())
    pictures = [draw(each, 144, 144, np.random.default_rng(seed)).astype(int) for each in (scene, without)]
    # Grain and speckle differ too, but cancel out over small squares.
    changed = np.abs((pictures[0] - pictures[1]).reshape(24, 6, 24, 6).mean((1, 3))) > 25
    down, across = np.nonzero(changed)
    return float(across.mean() / 24), float(down.mean() / 24), float(changed.sum())


@pytest.mark.parametrize("study", sorted(STUDIES))
def test_lesions_are_visible_where_and_as_large_as_told(study: str) -> None:
    modality, region = study.split("-")

    def shown(side: int, level: int, millimetres: int) -> tuple[float, float, float]:
        bright = (level + millimetres) % 2 == 0
        return centre_of_change(Scene(modality, region, False, bright, (Lesion(side, level, millimetres),)), seed=level)

    assert shown(RIGHT, 1, 22)[0] < 0.42 < 0.58 < shown(LEFT, 1, 22)[0]
    heights = [shown(LEFT, level, 32)[1] for level in (0, 1, 2)]
    assert heights[0] + 0.1 < heights[1] < heights[2] - 0.1
    sizes = [shown(LEFT, 1, millimetres)[2] for millimetres in (14, 22, 32)]
    assert sizes[0] * 1.3 < sizes[1] and sizes[1] * 1.3 < sizes[2]


def test_captions_are_specific_and_agree_with_the_answers() -> None:
    drawn = [sample for case in range(150) for sample in draw_case("test", 0, case)]
    assert len({sample.caption for sample in drawn}) > 0.97 * len(drawn)
    for sample in drawn:
        caption = sample.caption.lower()
        assert len(sample.questions) == 4 == len(dict(sample.questions))
        for question, answer in sample.questions:
            if answer in ("left", "right"):
                assert answer in caption, question
            if answer in ("two", "three"):
                assert answer in caption, question
            if answer.endswith(" mm"):
                assert answer in caption or f"{int(answer[:2]) / 10} cm" in caption


def test_a_question_alone_does_not_tell_its_answer() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for case in range(250):
        for sample in draw_case("train", 0, case):
            for question, answer in sample.questions:
                answers[question][answer] += 1
    for question, counts in answers.items():
        even = counts.total() / len(counts)
        assert counts.most_common(1)[0][1] < 1.25 * even + 3 * even**0.5, (question, counts)
    best = sum(counts.most_common(1)[0][1] for counts in answers.values())
    assert best / sum(counts.total() for counts in answers.values()) < 0.4


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validation"):
        draw_data_set(tmp_path, counts={"validation": 1})


def test_every_study_has_its_words() -> None:
    words = json.loads((Path(data_set.__file__).with_name("phantom.json")).read_text(encoding="utf-8"))
    assert set(words["studies"]) == set(STUDIES)
