"""Evaluation with encoders whose knowledge is known: everything, only the question, nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.tokens.store import SideTokens, TokenStore
from fuselip_core.data.tokens.writer import TokenStoreWriter, index_pairs, write_manifest
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.answers import answer_key
from fuselip_core.evaluation.comparisons import findings
from fuselip_core.evaluation.retrieval import CaptionPool, caption_rows
from fuselip_core.evaluation.tasks import evaluate, quick_look

KINDS = ("caption", "vqa")
WIDTH = 4096
BLANK = 999
COLUMNS = ("kind", "query_image", "query_text", "target_text", "answer_type")
SETTINGS = EvaluateSettings(batch_size=7, examples=3)

Row = tuple[str, int, str | None, str, str | None]
Meaning = Callable[[int | None, str], Any]


class FakePrepared:
    """What evaluation reads of prepared data: cases of images, and the training pairs."""

    def __init__(self, images: int, train: Sequence[Row] = (), splits: tuple[str, ...] = ("train", "test")) -> None:
        self.images, self.train, self.splits = images, list(train), splits
        self.manifest: dict[str, dict[str, object]] = {"counts": {}}

    def iter_images(self, split: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        ids = [f"image {row}" for row in range(self.images)]
        yield pa.RecordBatch.from_pydict({"image_id": ids, "case": ids})

    def pairs(self, split: str) -> pa.Table:
        assert split == "train"
        return pair_table(self.train)


def pair_table(rows: Sequence[Row]) -> pa.Table:
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)) if rows else {name: [] for name in COLUMNS}
    columns["query_image"] = [f"image {row}" for row in columns["query_image"]]
    columns |= {"target_image": [None] * len(rows), "group": columns["query_image"]}
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def store_of(folder: Path, rows: Sequence[Row]) -> TokenStore:
    """Image i has the code i twice; a text's ids are the code points of its lower-cased characters."""
    images = 1 + max(row[1] for row in rows)
    pairs, texts = index_pairs(pair_table(rows), [f"image {row}" for row in range(images)], KINDS)
    ids = [[ord(letter) for letter in text.lower()] for text in texts.to_pylist()]
    writer = TokenStoreWriter(folder, "test", images, 1, 2)
    writer.write_codes(0, np.arange(images)[:, None, None].repeat(2, axis=2))
    flat = np.array([letter for text in ids for letter in text])
    writer.finish(pairs, flat, np.cumsum([0, *map(len, ids)]), texts, np.full(2, BLANK))
    write_manifest(folder, {}, KINDS)
    return TokenStore(folder, "test")


class Reading:
    text_length: int | None = None


class Knowing(Reading):
    """Gives two sides the same direction exactly if `meaning` (of image or None, and text) is the same."""

    def __init__(self, meaning: Meaning) -> None:
        self.meaning = meaning
        self.known: dict[Any, int] = {}
        self.sizes: list[int] = []

    def encode(self, side: SideTokens) -> np.ndarray:
        self.sizes.append(len(side))
        embeddings = np.zeros((len(side), WIDTH), np.float32)
        for row in range(len(side)):
            text = "".join(map(chr, side.text_ids[row, : side.text_lengths[row]]))
            image = int(side.codes[row, 0]) if side.has_image[row] else None
            meaning = self.meaning(image, text)
            embeddings[row, self.known.setdefault(meaning, len(self.known))] = 1
        return embeddings


class Collapsed(Reading):
    def encode(self, side: SideTokens) -> np.ndarray:
        return np.full((len(side), 8), 8**-0.5, np.float32)


def captions(count: int) -> list[Row]:
    return [("caption", row, None, f"finding {row}", None) for row in range(count)]


def understands_captions(image: int | None, text: str) -> str:
    return text if image is None else f"finding {image}"


# Three images and two questions: only image and question together tell the answer.
QUESTIONS: list[Row] = [
    ("vqa", image, question, answer, "closed" if answer in ("yes", "no") else "open")
    for image, answers in enumerate([("yes", "left"), ("no", "right"), ("no", "both sides")])
    for question, answer in zip(["is it there?", "which side?"], answers, strict=True)
]
ANSWERS = {(image, question): answer for _, image, question, answer, _ in QUESTIONS}


def understands_questions(image: int | None, text: str) -> Any:
    return text if image is None else ANSWERS.get((image, text), (image, text))


def test_a_model_that_knows_all_is_right_and_its_shuffled_control_is_not(tmp_path: Path) -> None:
    encoder = Knowing(understands_captions)
    result = evaluate(encoder, store_of(tmp_path, captions(20)), FakePrepared(20), SETTINGS)
    metrics = result.metrics
    for direction in ("image_to_text", "text_to_image"):
        assert [metrics[f"retrieval/{direction}/recall_at_{k}"] for k in (1, 5, 10)] == [1, 1, 1]
        assert metrics[f"retrieval/{direction}/chance_at_1"] == pytest.approx(1 / 20)
        assert metrics[f"retrieval/{direction}/over_chance"] == pytest.approx(20)
        assert metrics[f"retrieval/{direction}/median_rank"] == 1
        assert metrics[f"retrieval_shuffled/{direction}/recall_at_1"] == 0
        assert metrics[f"retrieval_shuffled/{direction}/median_rank"] > 1
        assert metrics[f"retrieval/{direction}/mean_reciprocal_rank"] == 1
        assert result.intervals[f"retrieval/{direction}/gain/mean_reciprocal_rank"][0] > 0.5
        assert result.intervals[f"retrieval/{direction}/recall_at_1"][1] == 1
    assert metrics["retrieval/pool"] == 20
    assert max(encoder.sizes) == 7 and sum(encoder.sizes) == 40
    assert not any(name.startswith("answers") for name in metrics)


def test_captions_that_differ_only_behind_the_cut_are_one(tmp_path: Path) -> None:
    """A model that reads 9 letters can't tell "finding 1a" from "finding 1b": neither is a wrong answer."""
    rows: list[Row] = [("caption", row, None, f"finding {row // 2}{'ab'[row % 2]}", None) for row in range(8)]

    class Short(Knowing):
        text_length = 9

    encoder = Short(lambda image, text: text[:9] if image is None else f"finding {image // 2}")
    metrics = evaluate(encoder, store_of(tmp_path, rows), FakePrepared(8), SETTINGS).metrics
    assert metrics["retrieval/image_to_text/recall_at_1"] == metrics["retrieval/text_to_image/recall_at_1"] == 1
    assert metrics["retrieval/image_to_text/chance_at_1"] == pytest.approx(2 / 8)


def test_a_result_is_better_than_a_control_only_where_its_interval_says_so(tmp_path: Path) -> None:
    knowing = evaluate(
        Knowing(understands_captions), store_of(tmp_path / "a", captions(40)), FakePrepared(40), SETTINGS
    )
    numbers = knowing.numbers()
    assert numbers["retrieval/image_to_text/over_chance/low"] > 20
    assert numbers["retrieval_in_pools_of_10/image_to_text/recall_at_1"] == 1
    first = findings(numbers)[0]
    assert first.better and first.verdict == "better than chance"
    said = "Given an image, finds the right caption among 40 in the first ten for 100 ± 4 %; chance is 25.0 %."
    assert first.sentence == said
    # Right on 2 of 40 where chance gives one: nothing that can be told from chance.
    lucky = Knowing(lambda image, text: text if image is None else f"finding {image}" if image < 2 else "nothing")
    poor = findings(evaluate(lucky, store_of(tmp_path / "b", captions(40)), FakePrepared(40), SETTINGS).numbers())[0]
    assert not poor.better and "better" not in poor.verdict
    store = store_of(tmp_path / "c", QUESTIONS)
    guess = {"is it there?": "no", "which side?": "left"}
    reader = Knowing(lambda image, text: guess.get(text, text))
    answer = findings(evaluate(reader, store, FakePrepared(3), SETTINGS).numbers())[0]
    assert not answer.better and answer.verdict.startswith("not distinguishable from")


def test_equal_captions_are_all_right_in_both_directions(tmp_path: Path) -> None:
    rows = captions(6)
    rows[3] = ("caption", 3, None, "Finding 0", None)  # differs from "finding 0" only in what the model does not see
    rows.append(("caption", 5, None, "finding 1", None))  # image 5 has two captions, one of them shared with image 1
    store = store_of(tmp_path, rows)
    pool = CaptionPool.of(store, caption_rows(store))
    right = [pool.captions_of_image.of(image).tolist() for image in range(6)]
    assert right == [[0, 3], [1, 6], [2], [0, 3], [4], [1, 5, 6]]
    images = [pool.images_of_caption.of(caption).tolist() for caption in range(7)]
    assert images == [[0, 3], [1, 5], [2], [0, 3], [4], [5], [1, 5]]
    reading = {3: "finding 0"}
    encoder = Knowing(lambda image, text: text if image is None else reading.get(image, f"finding {image}"))
    metrics = evaluate(encoder, store, FakePrepared(6), SETTINGS).metrics
    assert metrics["retrieval/image_to_text/recall_at_1"] == metrics["retrieval/text_to_image/recall_at_1"] == 1
    assert metrics["retrieval/pool"] == 7
    assert metrics["retrieval/image_to_text/chance_at_1"] == pytest.approx((2 + 2 + 1 + 2 + 1 + 3) / 6 / 7)


def test_images_without_a_caption_are_wrong_answers_too(tmp_path: Path) -> None:
    """A caption was set aside, its image stays: caption → image is asked over every image of the split."""
    rows: list[Row] = [("caption", 0, None, "finding 0", None), ("caption", 2, None, "finding 2", None)]
    encoder = Knowing(lambda image, text: text if image is None else f"finding {0 if image == 1 else image}")
    metrics = evaluate(encoder, store_of(tmp_path, rows), FakePrepared(3), SETTINGS).metrics
    assert (metrics["retrieval/pool"], metrics["retrieval/pool_images"]) == (2, 3)
    assert metrics["retrieval/text_to_image/chance_at_1"] == pytest.approx(1 / 3)
    # Image 1, which has no caption, ties with image 0: a wrong answer.
    assert metrics["retrieval/text_to_image/recall_at_1"] == 0.5
    assert metrics["retrieval/image_to_text/recall_at_1"] == 1.0


def test_a_collapsed_model_is_never_right(tmp_path: Path) -> None:
    store = store_of(tmp_path, captions(12) + QUESTIONS)
    metrics = evaluate(Collapsed(), store, FakePrepared(12), SETTINGS).metrics
    shares = {name: value for name, value in metrics.items() if "recall_at" in name or "accuracy" in name}
    assert len(shares) > 15
    assert not any(shares.values())
    assert metrics["answers/fused/over_best_control"] == 0


def test_answers_need_image_and_question(tmp_path: Path) -> None:
    store = store_of(tmp_path, QUESTIONS)
    metrics = evaluate(Knowing(understands_questions), store, FakePrepared(3, QUESTIONS), SETTINGS).metrics
    assert metrics["answers/pool"] == 5
    assert metrics["answers/chance"] == pytest.approx(0.2)
    for part in ("accuracy", "accuracy_closed", "accuracy_open"):
        assert metrics[f"answers/fused/{part}"] == 1
        for control in ("question_only", "image_only", "blank_image"):
            assert metrics[f"answers/{control}/{part}"] == 0
    # Another image gives another answer, but for the two images that share one.
    assert metrics["answers/shuffled_image/accuracy_open"] == 0
    assert 0 <= metrics["answers/shuffled_image/accuracy_closed"] <= 1 / 3
    controls = ("question_only", "image_only", "blank_image", "shuffled_image", "majority", "majority_by_question")
    strongest = max(metrics[f"answers/{name}/accuracy"] for name in controls)
    assert strongest > metrics["answers/chance"]
    assert metrics["answers/fused/over_best_control"] == pytest.approx(1 / strongest)
    assert metrics["answers/fused/accuracy/is-it-there"] == metrics["answers/fused/accuracy/which-side"] == 1
    assert metrics["answers/blank_image/accuracy/which-side"] == 0
    assert metrics["answers/gain/blank_image/accuracy"] == 1
    gains = [metrics[f"answers/gain/{name}/accuracy"] for name in ("shuffled_image", "majority")]
    assert gains == [1 - metrics[f"answers/{name}/accuracy"] for name in ("shuffled_image", "majority")]
    assert metrics["answers/gain/smallest"] == min(gains)
    assert metrics["answers/fused/mean_reciprocal_rank"] == 1
    assert 0 < metrics["answers/gain/shuffled_image/mean_reciprocal_rank"] < 1
    assert (metrics["answers/questions_closed"], metrics["answers/questions_open"]) == (3, 3)
    assert not any(name.startswith("retrieval") for name in metrics)


@pytest.mark.parametrize("strongest", ["majority_by_question", "shuffled_image", "blank_image"])
def test_the_best_control_is_the_strongest_of_all(tmp_path: Path, strongest: str) -> None:
    """17 of 20 questions are answered right; question alone and image alone are right on none, one control on ten."""
    rows: list[Row] = [
        ("vqa", image, "left or right?", "left" if image < 10 else "right", "open") for image in range(20)
    ]
    answer_of = {image: answer for _, image, _, answer, _ in rows}

    def meaning(image: int | None, text: str) -> Any:
        if text in ("left", "right") and image is None:
            return text
        if image == BLANK:
            return "left" if strongest == "blank_image" else "nothing"
        if image is None or not text:
            return "nothing"
        return answer_of[image] if image not in (0, 1, 19) else "nothing"

    train = [("vqa", 0, "left or right?", "left", "open")] if strongest == "majority_by_question" else []
    metrics = evaluate(Knowing(meaning), store_of(tmp_path, rows), FakePrepared(20, train), SETTINGS).metrics
    assert metrics["answers/fused/accuracy"] == pytest.approx(17 / 20)
    assert metrics["answers/question_only/accuracy"] == metrics["answers/image_only/accuracy"] == 0
    if strongest != "shuffled_image":
        assert metrics[f"answers/{strongest}/accuracy"] == pytest.approx(10 / 20)
    best = max(metrics[f"answers/{strongest}/accuracy"], metrics["answers/shuffled_image/accuracy"], 1 / 2)
    assert metrics["answers/fused/over_best_control"] == pytest.approx(17 / 20 / best)


def test_a_model_that_reads_only_the_question_does_no_better_than_its_control(tmp_path: Path) -> None:
    likely = {"is it there?": "no", "which side?": "left"}
    encoder = Knowing(lambda image, text: likely.get(text, text))
    store = store_of(tmp_path, QUESTIONS)
    result = evaluate(encoder, store, FakePrepared(3), SETTINGS)
    metrics = result.metrics
    for name in ("fused", "question_only", "blank_image", "shuffled_image"):
        assert metrics[f"answers/{name}/accuracy"] == pytest.approx(0.5)
        assert metrics[f"answers/{name}/accuracy_closed"] == pytest.approx(2 / 3)
    assert metrics["answers/image_only/accuracy"] == 0
    assert metrics["answers/fused/over_best_control"] == pytest.approx(1)
    assert metrics["answers/gain/shuffled_image/accuracy"] == metrics["answers/gain/smallest"] == 0
    low, high = result.intervals["answers/gain/shuffled_image/accuracy"]
    assert low < 0 < high


def test_majority_comes_from_training_by_type_and_by_question(tmp_path: Path) -> None:
    train: list[Row] = [
        ("vqa", 0, "is it there?", "Yes", "closed"),
        ("vqa", 0, "is it large?", "no", "closed"),
        ("vqa", 0, "is it old?", "no", "closed"),
        ("vqa", 0, "which side?", "right.", "open"),
        ("caption", 0, None, "left", None),
    ]
    metrics = evaluate(Collapsed(), store_of(tmp_path, QUESTIONS), FakePrepared(3, train), SETTINGS).metrics
    assert metrics["answers/majority/accuracy_closed"] == pytest.approx(2 / 3)
    assert metrics["answers/majority/accuracy_open"] == pytest.approx(1 / 3)
    assert metrics["answers/majority/accuracy"] == pytest.approx(1 / 2)
    assert metrics["answers/majority_by_question/accuracy_closed"] == pytest.approx(1 / 3)


def test_without_training_answers_there_is_no_majority(tmp_path: Path) -> None:
    store = store_of(tmp_path, QUESTIONS)
    for prepared in (FakePrepared(3), FakePrepared(3, splits=("test",))):
        metrics = evaluate(Collapsed(), store, prepared, SETTINGS).metrics
        assert not any("majority" in name for name in metrics)


def test_answers_that_differ_only_in_writing_are_one(tmp_path: Path) -> None:
    assert answer_key("  Left  LUNG. ") == "left lung"
    rows: list[Row] = [("vqa", 0, "where?", "Left lung", "open"), ("vqa", 1, "where?", "left lung.", "open")]
    metrics = evaluate(Collapsed(), store_of(tmp_path, rows), FakePrepared(2), SETTINGS).metrics
    assert metrics["answers/pool"] == 1


def test_examples_show_the_first_candidates_and_are_the_same_in_every_run(tmp_path: Path) -> None:
    store = store_of(tmp_path, captions(12) + QUESTIONS)

    def meaning(image: int | None, text: str) -> Any:
        return understands_questions(image, text) if image is None or text else understands_captions(image, text)

    results = [evaluate(Knowing(meaning), store, FakePrepared(12), SETTINGS) for _ in range(2)]
    assert results[0].retrieval == results[1].retrieval and results[0].answers == results[1].answers
    assert len(results[0].retrieval) == len(results[0].answers) == 3
    for example in results[0].retrieval:
        assert example.rank == 1 and example.captions == (f"finding {example.image}",)
        assert [candidate.right for candidate in example.top] == [True] + [False] * 4
        assert example.top[0].text == f"finding {example.image}" and example.top[0].score == pytest.approx(1)
    for answer in results[0].answers:
        assert answer.answer == ANSWERS[answer.image, answer.question] == answer.top[0].text
        assert answer.answer_type == ("closed" if answer.answer in ("yes", "no") else "open")


def test_a_quick_look_agrees_with_the_evaluation_where_it_sees_everything(tmp_path: Path) -> None:
    store = store_of(tmp_path, captions(12) + QUESTIONS)
    look = quick_look(Knowing(understands_captions), store, 100)
    whole = evaluate(Knowing(understands_captions), store, FakePrepared(12), SETTINGS).metrics
    name = "retrieval/image_to_text/recall_at_1"
    assert look[name] == whole[name] == 1
    assert look["answers/accuracy"] == whole["answers/fused/accuracy"]
    encoder = Knowing(understands_captions)
    quick_look(encoder, store, 4, batch_size=3)
    assert sum(encoder.sizes) <= 2 * 4 + 2 * 4


def test_what_cannot_be_measured_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, [("vqa", 0, None, "nothing asked", "open")])
    with pytest.raises(FuselipError, match="neither captions nor questions"):
        evaluate(Collapsed(), store, FakePrepared(1), SETTINGS)
    with pytest.raises(FuselipError, match="5 prepared images but 3 tokenized"):
        evaluate(Collapsed(), store_of(tmp_path / "other", captions(3)), FakePrepared(5), SETTINGS)


def test_embeddings_that_are_not_finite_end_the_evaluation(tmp_path: Path) -> None:
    class Broken(Collapsed):
        def encode(self, side: SideTokens) -> np.ndarray:
            return super().encode(side) * np.where(side.has_image, np.nan, 1)[:, None]

    with pytest.raises(FuselipError, match="not finite"):
        evaluate(Broken(), store_of(tmp_path, captions(3)), FakePrepared(3), SETTINGS)
