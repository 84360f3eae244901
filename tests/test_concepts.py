"""Concepts of images: F1 as ImageCLEFmedical computes it, rankings and areas, on cases small enough to do by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, label_ranking_average_precision_score

from fuselip_core.config import EvaluateSettings
from fuselip_core.evaluation.concepts import auc, average_precision, f1, measure_concepts, named
from fuselip_core.evaluation.result import EvaluationResult

RIGHT = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]], bool)


def test_f1_by_hand() -> None:
    chosen = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]], bool)
    # 2 * 1 / (1 + 2), 2 * 1 / (3 + 1), 2 * 2 / (2 + 2), no hit
    np.testing.assert_allclose(f1(chosen, RIGHT, RIGHT.sum(axis=1)), [2 / 3, 1 / 2, 1, 0])
    # The first image has two more concepts that no training image has: 2 * 1 / (1 + 4).
    np.testing.assert_allclose(f1(chosen, RIGHT, np.array([4, 1, 2, 1]))[0], 2 / 5)
    assert f1(np.zeros_like(RIGHT), RIGHT, RIGHT.sum(axis=1)).tolist() == [0, 0, 0, 0]


def test_f1_is_that_of_the_published_evaluation() -> None:
    """It scores each image by scikit-learn's F1 over the union of its true and its named concepts, and averages."""
    generator = np.random.default_rng(0)
    chosen, right = generator.random((50, 12)) < 0.3, generator.random((50, 12)) < 0.2
    right[np.arange(50), generator.integers(0, 12, 50)] = True
    chosen[np.arange(50), generator.integers(0, 12, 50)] = True
    expected = []
    for names, truth in zip(chosen, right, strict=True):
        union = np.flatnonzero(names | truth)
        expected.append(f1_score(truth[union], names[union], average="binary"))
    reached = f1(chosen, right, right.sum(axis=1))
    np.testing.assert_allclose(reached, expected)
    assert np.mean(reached) == pytest.approx(f1_score(right, chosen, average="samples"))


def test_the_best_concept_is_named_in_any_case() -> None:
    scores = np.array([[0.9, 0.6, 0.1], [0.2, 0.3, 0.1]])
    assert named(scores, 0.5).tolist() == [[True, True, False], [False, True, False]]


def test_average_precision_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.9, 0.8], [0.5, 0.5, 0.5, 0.5]])
    # Places 1 and 4; place 4; places 1 and 2; a tie of all four is the last place.
    expected = [(1 / 1 + 2 / 4) / 2, 1 / 4, 1, 1 / 4]
    np.testing.assert_allclose(average_precision(RIGHT, scores), expected)
    generator = np.random.default_rng(1)
    scores, right = generator.random((30, 9)).round(1), generator.random((30, 9)) < 0.4
    right[:, 0] = True
    reached = np.mean(average_precision(right, scores))
    assert reached == pytest.approx(label_ranking_average_precision_score(right, scores))


def test_areas_by_hand_and_none_where_all_or_no_image_has_the_concept() -> None:
    right = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    scores = np.array([[0.5, 0.9, 0.1, 0.3], [0.4, 0.5, 0.2, 0.3], [0.1, 0.2, 0.3, 0.1]])
    # Concept 1: images 0 and 2 are right, 0 above image 1 and 2 below: one of two. Concept 3: a tie and a win of two.
    np.testing.assert_allclose(auc(right, scores), [np.nan, 0.5, np.nan, 0.75])


class Prepared:
    """Prepared data of two splits whose images have the concepts that are given."""

    def __init__(self, concepts: dict[str, list[list[str]]], names: dict[str, str]) -> None:
        self.concepts, self.manifest = concepts, {"concept_names": names}

    def iter_images(self, split: str, columns: list[str], batch_rows: int = 1) -> list[Batch]:
        rows = [
            {"image_id": f"{split}{number}", "case": f"{split}{number}", "concepts": codes}
            for number, codes in enumerate(self.concepts[split])
        ]
        return [Batch(rows)]


class Batch(list):
    def to_pylist(self) -> list[dict]:
        return list(self)

    def column(self, name: str) -> Batch:
        return Batch([row[name] for row in self])


class Store:
    """Images whose codes are their numbers; see Model."""

    text_offsets = np.zeros(2, np.int64)

    def __init__(self, count: int) -> None:
        self.codes, self.codes_per_image = np.arange(count, dtype=np.int32).reshape(count, 1, 1), 1
        self.texts, self.blank = np.zeros(0, np.uint16), np.zeros(1, np.int32)


class Model:
    """Embeds image i as rows[i] and the names as given."""

    def __init__(self, rows: np.ndarray, names: dict[str, np.ndarray]) -> None:
        self.rows, self.names = rows.astype(np.float32), names

    def encode(self, side: object) -> np.ndarray:
        return self.rows[side.codes[:, 0]]

    def embed(self, images: list, texts: list, batch_size: int) -> np.ndarray:
        return np.stack([self.names[text] for text in texts]).astype(np.float32)


def concepts_of(rows: np.ndarray) -> list[list[str]]:
    """Concept A for images that point along the first axis, B along the second; all have C."""
    return [["C", "A" if row[0] > row[1] else "B"] for row in rows]


def measured(know: bool) -> EvaluationResult:
    generator = np.random.default_rng(0)
    rows = {}
    for split, count in (("train", 80), ("test", 40)):
        axis = generator.integers(0, 2, count)
        rows[split] = np.eye(3)[axis] + generator.normal(0, 0.05, (count, 3))
        rows[split] /= np.linalg.norm(rows[split], axis=1, keepdims=True)
    prepared = Prepared({split: concepts_of(each) for split, each in rows.items()}, {"A": "ay", "B": "bee", "C": "sea"})
    if not know:
        rows = {split: generator.permutation(each) for split, each in rows.items()}
    names = {"ay": np.eye(3)[0], "bee": np.eye(3)[1], "sea": np.array([0.8, 0.8, 0.0])}
    own, training = ((Model(rows[split], names), Store(len(rows[split]))) for split in ("test", "train"))
    result = EvaluationResult("test")
    measure_concepts(own[0], own, training, prepared, EvaluateSettings(), result)
    return result


def test_a_model_that_knows_its_concepts() -> None:
    result = measured(know=True)
    numbers = result.numbers()
    for name in ("probe", "neighbours"):
        assert numbers[f"concepts/{name}/f1"] == 1 and numbers[f"concepts/{name}/auc"] == 1
        assert numbers[f"concepts/gain/{name}/f1/low"] > 0
    # The most frequent of A and B with C for every image: 1 for about half, 2 * 1 / (2 + 2) for the others.
    assert 0.7 < numbers["concepts/most_frequent/f1"] < 0.85
    assert numbers["concepts/zero_shot/average_precision"] == 1
    assert numbers["concepts/zero_shot/auc"] == 1
    assert numbers["concepts/gain/zero_shot/average_precision/low"] > 0
    most = result.concepts[0]
    assert (most.code, most.name, most.images, most.training_images) == ("C", "sea", 40, 80)
    assert most.auc == {}  # every image has it
    assert result.concepts[1].auc == {"zero_shot": 1, "probe": 1, "neighbours": 1}


def test_a_model_that_does_not() -> None:
    numbers = measured(know=False).numbers()
    for name in ("probe", "neighbours"):
        assert numbers[f"concepts/gain/{name}/f1/low"] <= 0
        assert 0.2 < numbers[f"concepts/{name}/auc"] < 0.8
    assert numbers["concepts/gain/zero_shot/average_precision/low"] <= 0


def test_no_concepts_no_measure() -> None:
    result = EvaluationResult("test")
    model = Model(np.eye(3), {})
    measure_concepts(model, (model, Store(3)), None, Prepared({"test": [[], [], []]}, {}), EvaluateSettings(), result)
    assert not result.metrics and not result.concepts


def test_without_training_images_names_are_ranked_alone() -> None:
    model = Model(np.eye(3), {"ay": np.eye(3)[0], "bee": np.eye(3)[1]})
    prepared = Prepared({"test": [["A"], ["B"], ["A"]]}, {"A": "ay", "B": "bee"})
    result = EvaluationResult("test")
    measure_concepts(model, (model, Store(3)), None, prepared, EvaluateSettings(), result)
    # The third image is as far from both names: a tie, so place 2 of 2.
    assert result.metrics["concepts/zero_shot/average_precision"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert "concepts/probe/f1" not in result.metrics
