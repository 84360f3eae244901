"""VQA-RAD as published, and questions beside an image data set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import DataError, answer_text
from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.data.prepare.extra_pairs import add_extra_pairs
from fuselip_core.data.sources.catalogue import list_source
from fuselip_core.data.sources.vqa_rad import list_vqa_rad


def test_vqa_rad_has_its_published_counts(shared: Path) -> None:
    listing = list_vqa_rad(shared / "data" / "vqa-rad")
    assert Counter(pair.split for pair in listing.pairs) == {"train": 1797, "test": 451}
    assert Counter(image.split for image in listing.images) == {"train": 313, "test": 203}
    # One file says "CLOSED " with a space.
    assert Counter(pair.answer_type for pair in listing.pairs) == {"closed": 1299, "open": 949}
    assert listing.set_aside == []
    assert all(pair.target.text == pair.target.text.lower().strip() for pair in listing.pairs if pair.target.text)
    assert len({pair.pair_id for pair in listing.pairs}) == 2248


def row(qid: int, image: str, case: str, **changes: object) -> dict[str, object]:
    return {
        "qid": qid,
        "phrase_type": "freeform",
        "image_name": image,
        "image_case_url": case,
        "question": "How many  lesions\nare there? ",
        "answer": 2,
        "answer_type": "OPEN ",
        **changes,
    }


def write(root: Path, rows: object, images: tuple[str, ...] = ("a.jpg", "b.jpg", "c.jpg")) -> Path:
    root.mkdir()
    (root / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "images").mkdir()
    for name in images:
        (root / "images" / name).write_bytes(b"not read here")
    return root


def test_cases_that_share_an_image_are_one_case(tmp_path: Path) -> None:
    rows = [row(1, "a.jpg", "x"), row(2, "a.jpg", "y "), row(3, "b.jpg", "y"), row(4, "c.jpg", "z")]
    listing = list_vqa_rad(write(tmp_path / "vqa", rows))
    cases = {image.image_id: image.case for image in listing.images}
    assert cases["a"] == cases["b"] != cases["c"]
    pair = listing.pairs[0]
    assert (pair.query.text, pair.target.text, pair.answer_type) == ("How many lesions are there?", "2", "open")


def test_what_is_said_about_an_image_becomes_pairs_of_the_image_alone(tmp_path: Path) -> None:
    rows = [
        row(1, "a.jpg", "x", question="Is this an MRI?", answer="No", answer_type="CLOSED", image_organ="CHEST"),
        row(2, "a.jpg", "x", question="Which side?", answer="left", image_organ="CHEST"),
        row(3, "b.jpg", "y", phrase_type="test_freeform", image_organ="HEAD"),
        row(4, "c.jpg", "z", image_organ="KNEE"),
    ]
    root = write(tmp_path / "vqa", rows)
    settings = PrepareSettings(source="vqa-rad", root=root, extra_pairs=("statements", "concepts"))
    listing = list_source("vqa-rad", root, settings)
    add_extra_pairs(root, listing, settings.extra_pairs)
    said = {(pair.kind, pair.split, pair.query.image, pair.target.text) for pair in listing.pairs if pair.kind != "vqa"}
    assert said == {
        ("statement", "train", "a", "Is this an MRI? no"),
        ("statement", "train", "a", "Which side? left"),
        ("statement", "test", "b", "How many lesions are there? 2"),
        ("statement", "train", "c", "How many lesions are there? 2"),
        ("concepts", "train", "a", "chest"),
        ("concepts", "test", "b", "head"),
    }
    assert all(pair.query.text is None for pair in listing.pairs if pair.kind != "vqa")
    assert len({pair.pair_id for pair in listing.pairs}) == len(listing.pairs)


def test_every_organ_of_vqa_rad_has_a_name(shared: Path) -> None:
    listing = list_vqa_rad(shared / "data" / "vqa-rad")
    names = [listing.concept_names[code] for image in listing.images for code in image.concepts]
    assert len(names) == len(listing.images) and set(names) == {"head", "chest", "abdomen"}


def test_unusable_questions_are_set_aside(tmp_path: Path) -> None:
    rows = [
        row(1, "a.jpg", "x"),
        row(1, "a.jpg", "x"),
        row(2, "a.jpg", "x", question=" "),
        row(3, "a.jpg", "x", answer=None),
        row(4, "gone.jpg", "x"),
    ]
    listing = list_vqa_rad(write(tmp_path / "vqa", rows))
    assert [item.reason for item in listing.set_aside] == [
        "repeated_id",
        "empty_question",
        "empty_answer",
        "missing_image",
    ]
    assert listing.notes == ["2 of 3 image files have no question and were ignored"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"qid": 1}], "lacks the columns phrase_type"),
        ({}, "does not contain a list"),
        ([], "empty list"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, rows: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        list_vqa_rad(write(tmp_path / "vqa", rows))


def test_broken_or_absent_json_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "vqa", [])
    (root / "questions.json").write_text("[{", encoding="utf-8")
    with pytest.raises(DataError, match="not valid JSON"):
        list_vqa_rad(root)
    (root / "questions.json").unlink()
    with pytest.raises(DataError, match="exactly one JSON file"):
        list_vqa_rad(root)


def test_the_sample_brings_four_questions_an_image(tmp_path: Path) -> None:
    draw_data_set(tmp_path, seed=0, counts={"train": 5, "test": 3})
    with (tmp_path / "test_questions.csv").open("a", encoding="utf-8") as stream:
        stream.write("ROCOv2_nowhere,Which modality?,CT\n")
    listing = list_source("phantom", tmp_path)
    assert Counter((pair.split, pair.kind) for pair in listing.pairs) == {
        ("train", "caption"): 5,
        ("train", "vqa"): 20,
        ("test", "caption"): 3,
        ("test", "vqa"): 12,
    }
    assert [item.reason for item in listing.set_aside] == ["missing_image"]
    assert all(
        (pair.target.text in ("yes", "no")) == (pair.answer_type == "closed")
        for pair in listing.pairs
        if pair.answer_type
    )


def test_answers_compare_as_strings() -> None:
    assert answer_text(" Right  Lung\n") == answer_text("right lung")
    assert answer_text(12) == "12"


def test_a_missing_sample_says_how_to_draw_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fuselip sample"):
        list_source("phantom", tmp_path / "data")
