"""The report: complete, self-contained, escaped, and readable by a browser and by a screen reader."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jinja2 import UndefinedError
from PIL import Image

from fuselip_core.config import check_settings
from fuselip_core.data.prepare.image_shards import IMAGE_SCHEMA
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.comparisons import percent
from fuselip_core.evaluation.report.charts import draw_training
from fuselip_core.evaluation.report.page import write_report
from fuselip_core.evaluation.result import AnswerExample, Candidate, Concept, EvaluationResult, RetrievalExample
from fuselip_core.html import data_uri, render

NASTY = "<script>alert('x')</script> & \"quoted\""
VOID = {"img", "meta", "br"}


class Page(HTMLParser):
    """Checks that elements are closed in order; collects texts, attributes and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag_name, attributes in self.tags if tag_name == name]


def prepare(artifacts: Path, notes: tuple[str, ...] = ()) -> None:
    """Prepared data of three images, the last of them damaged."""
    folder = artifacts / "prepared"
    folder.mkdir(parents=True)
    stream = io.BytesIO()
    Image.new("L", (64, 48), 120).save(stream, "PNG")
    rows = [{"image_id": f"image-{row}", "bytes": stream.getvalue(), "attribution": NASTY} for row in range(3)]
    rows[2]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA), folder / "images-test-00000-of-00001.parquet")
    counts = {"test": {"images": 3, "cases": 2, "pairs": {"caption": 3, "vqa": 2}}, "train": {"images": 9, "pairs": {}}}
    manifest = {
        "source": "phantom",
        "data_version": "0123456789abcdef",
        "counts": counts,
        "shards": [{"path": "images-test-00000-of-00001.parquet", "rows": 3, "sha256": ""}],
        "quarantine": {"placeholder_caption": 1234},
        "duplicates": {"within_splits": 5},
        "notes": list(notes),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def retrieval_metrics() -> dict[str, float]:
    metrics = {"retrieval/pool": 3.0, "retrieval/pool_images": 3.0}
    for direction in ("image_to_text", "text_to_image"):
        for k, chance in ((1, 0.01), (5, 0.05), (10, 0.1)):
            metrics[f"retrieval/{direction}/recall_at_{k}"] = 0.25
            metrics[f"retrieval/{direction}/chance_at_{k}"] = chance
            metrics[f"retrieval_shuffled/{direction}/recall_at_{k}"] = 0.02
        metrics[f"retrieval/{direction}/median_rank"] = 2.5
        metrics[f"retrieval_shuffled/{direction}/median_rank"] = 6.0
        metrics[f"retrieval/{direction}/mean_reciprocal_rank"] = 0.45
        metrics[f"retrieval_shuffled/{direction}/mean_reciprocal_rank"] = 0.05
        metrics[f"retrieval/{direction}/gain/mean_reciprocal_rank"] = 0.4
        metrics[f"retrieval/{direction}/gain/recall_at_10"] = 0.23
    return metrics


def answer_metrics(fused: float = 0.6) -> dict[str, float]:
    metrics = {"answers/chance": 0.1, "answers/pool": 10.0, "answers/fused/over_best_control": fused / 0.35}
    metrics["answers/gain/smallest"] = fused - 0.35
    metrics |= {"answers/questions": 2.0, "answers/questions_closed": 1.0, "answers/questions_open": 1.0}
    shares = {"fused": fused, "question_only": 0.3, "image_only": 0.1, "blank_image": 0.2, "shuffled_image": 0.2}
    for query, share in (shares | {"majority": 0.35}).items():
        for part in ("accuracy", "accuracy_closed", "accuracy_open"):
            metrics[f"answers/{query}/{part}"] = share
        if query != "fused":
            metrics[f"answers/gain/{query}/accuracy"] = fused - share
    return metrics


def concept_metrics() -> dict[str, float]:
    metrics = {"concepts/images": 3.0, "concepts/candidates": 16.0, "concepts/training_images": 9.0}
    metrics |= {"concepts/probe/f1": 0.7391, "concepts/most_frequent/f1": 0.53, "concepts/probe/auc": 0.871}
    metrics |= {"concepts/gain/probe/f1": 0.2091, "concepts/zero_shot/average_precision": 0.285}
    return metrics


def result_of(metrics: dict[str, float]) -> EvaluationResult:
    intervals = {
        name: (value - 0.1, value + 0.1) if "/gain/" in name else (max(0.0, value - 0.1), min(1.0, value + 0.1))
        for name, value in metrics.items()
        if "recall_at" in name or "accuracy" in name or "/gain/" in name or name.endswith(("/f1", "_precision"))
    }
    top = (Candidate("a wrong caption", 0.5, False, 1), Candidate(NASTY, 0.25, True, 2))
    images = (Candidate("", 0.5, False, 1, 1), Candidate("", 0.25, True, 1234, 0))
    result = EvaluationResult("test", metrics, intervals)
    if "retrieval/pool" in metrics:
        result.retrieval = [RetrievalExample(0, (NASTY,), 2, top), RetrievalExample(2, ("other",), 1, top[1:])]
        result.captions = [RetrievalExample(None, ("a caption that asks",), 1234, images)]
        result.worst = [RetrievalExample(0, ("the worst",), 399, top)]
    if "concepts/images" in metrics:
        result.concepts = [Concept("C1", NASTY, 3, 9, {}), Concept("C2", "Skull", 2, 5, {"probe": 0.875})]
    if "answers/pool" in metrics:
        result.answers = [AnswerExample(1, NASTY, "left lung", "open", 4321, top, 0, "right lung")]
    return result


def write(artifacts: Path, metrics: dict[str, float], **settings: object) -> Page:
    chosen = check_settings({"artifacts": artifacts, **settings}, "test")
    path = write_report(chosen, result_of(metrics | {"model/parameters": 3.2e6}))
    assert path == artifacts / "report" / "index.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a run leaves behind, and the report on it."""
    folder = tmp_path_factory.mktemp("artifacts")
    prepare(folder, notes=(f"2 shared images {NASTY}",))
    lines = [{"step": step, "contrastive": 1 / step, "lr": 1e-3, "pairs_per_second": 50} for step in range(1, 50)]
    history = [*lines, {"step": 49, "valid/retrieval/image_to_text/recall_at_1": 0.5}]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    (folder / "codebook").mkdir()
    Image.new("RGB", (80, 20)).save(folder / "codebook" / "reconstructions.png")
    (folder / "tracking" / "train").mkdir(parents=True)
    known = {"tags": {"git_commit": "abcdef0123456789", "git_dirty": "false"}, "mlflow_uri": "http://here:5000"}
    known |= {"mlflow_experiment_id": "7", "mlflow_run_id": "feed"}
    (folder / "tracking" / "train" / "run.json").write_text(json.dumps(known))
    gates = [{"metric": "answers/gain/majority/accuracy", "at_least": 0.2}, {"metric": "no/such", "at_least": 1}]
    write(folder, retrieval_metrics() | answer_metrics(), register={"gates": gates})
    return folder


@pytest.fixture(scope="module")
def page(artifacts: Path) -> Page:
    return Page((artifacts / "report" / "index.html").read_text(encoding="utf-8"))


def test_the_page_needs_no_other_file(page: Page) -> None:
    for name, attributes in page.tags:
        assert not attributes.get("src") or attributes["src"].startswith("data:image/")
        assert not attributes.get("href") or attributes["href"].startswith(("#", "http://here:5000/"))
        assert name not in ("script", "link", "iframe", "object")
    anchors = {attributes["href"] for attributes in page.all("a")} - {"http://here:5000/#/experiments/7/runs/feed"}
    assert anchors == {f"#{attributes['id']}" for attributes in page.all("section")}


def test_every_picture_has_an_alternative_text(page: Page) -> None:
    pictures = page.all("img")
    # Curves, reconstructions, and the pictures of the examples that can be read.
    assert len(pictures) == 2 + 5
    assert all(attributes["alt"] for attributes in pictures)


def test_strings_are_escaped_and_shown(page: Page, artifacts: Path) -> None:
    source = (artifacts / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in source
    # Caption, candidates, question, attribution and note.
    assert page.text.count(NASTY) >= 6


@pytest.mark.parametrize(
    "shown",
    [
        "25.0 %",
        "15.0 to 35.0 %",
        "1.71 times the strongest control",
        "abcdef0123",
        "answers/gain/majority/accuracy: 0.15, at least 0.2",
        "no/such: missing",
        "in the first ten for 25 ± 10",
        "the strongest control (most frequent answer) reaches 35.0",
        "With another image: right lung",
        "Best right image: rank 1,234",
        "✓ 1,234",
        "60.0 %",
        "rank 4,321",
        "+25.0 [+15.0 to +35.0]",
        "3,200,000",
        "placeholder caption",
        "1,234",
        "2.5",
        "better than every control",
        "not shown: not an image",
        "batch_size: 128",
    ],
)
def test_what_was_measured_is_on_the_page(page: Page, shown: str) -> None:
    assert shown in page.text


def test_right_candidates_are_marked(page: Page) -> None:
    assert [attributes["class"] for attributes in page.all("li") if "class" in attributes].count("right") == 4
    assert [attributes.get("class") for attributes in page.all("figure")] == [None, "right"]


def test_charts_and_numbers_lie_beside_the_page(artifacts: Path) -> None:
    folder = artifacts / "report"
    names = {path.name for path in folder.iterdir()}
    charts = {"retrieval.png", "answers.png", "training.png", "reconstructions.png"}
    assert names == charts | {"index.html", "results.json"}
    for name in charts:
        with Image.open(folder / name) as image:
            image.load()
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["answers/fused/accuracy"] == 0.6
    assert results["intervals"]["answers/fused/accuracy"] == pytest.approx([0.5, 0.7])
    assert results["answers"][0]["question"] == NASTY


@pytest.mark.parametrize(
    ("metrics", "there", "missing"),
    [(retrieval_metrics, "Image → caption", "Answers"), (answer_metrics, "Question alone", "Retrieval")],
)
def test_a_split_with_one_kind_of_pairs_gets_one_section(
    tmp_path: Path, metrics: Callable[[], dict[str, float]], there: str, missing: str
) -> None:
    prepare(tmp_path)
    page = write(tmp_path, metrics())
    assert there in page.text and missing not in page.text
    assert "No curves were logged" in page.text


def test_concepts_stand_beside_their_control_and_what_is_published(tmp_path: Path) -> None:
    prepare(tmp_path)
    text = write(tmp_path, concept_metrics()).text
    assert "with an F1 of 0.739 ± 0.100; always naming the most frequent ones reaches 0.530." in text
    assert "better than naming the most frequent concepts" in text
    assert "0.739 [0.639 to 0.839]" in text and "+0.209 [+0.109 to +0.309]" in text
    assert "comparable only there: 0.559 (a single DenseNet-121), 0.589 (winner of 2025)" in text
    assert re.search(r"Skull\s*2\s*5\s*0\.875", text) and "Concepts without AUC, since all images have them: 1." in text
    assert json.loads((tmp_path / "report" / "results.json").read_text())["concepts"][1]["auc"] == {"probe": 0.875}
    worse = concept_metrics() | {"concepts/gain/probe/f1": 0.05}
    assert "not distinguishable from naming the most frequent" in write(tmp_path, worse).text


def test_a_model_that_reads_pixels_is_not_said_to_read_codes(tmp_path: Path, page: Page) -> None:
    assert "sees images only as codes of this tokenizer" in page.text
    prepare(tmp_path)
    model = {"family": "siglip-sf", "mask_token": False}
    text = write(tmp_path, answer_metrics(), model=model, train={"mask_weight": 0}).text
    assert "encoder reads pixels" in text and "only as codes" not in text


def test_the_head_of_a_split_without_pairs_is_a_sentence(tmp_path: Path, page: Page) -> None:
    assert "on the test split: 3 images, 3 captions, 2 questions. Recipe" in page.text
    prepare(tmp_path)
    manifest = tmp_path / "prepared" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["counts"]["test"]["pairs"] = {}  # as an evaluation set of questions with options has none
    manifest.write_text(json.dumps(content))
    assert "on the test split: 3 images. Recipe" in write(tmp_path, answer_metrics()).text


def test_what_is_not_better_than_its_controls_is_said_so(tmp_path: Path) -> None:
    prepare(tmp_path)
    text = write(tmp_path, answer_metrics(fused=0.4)).text
    assert "not distinguishable from its strongest control (most frequent answer)" in text


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    prepare(tmp_path)
    write(tmp_path, answer_metrics())
    (tmp_path / "report" / "left over").touch()
    write(tmp_path, answer_metrics())
    assert not (tmp_path / "report" / "left over").exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def run_named(artifacts: Path, name: str) -> None:
    (artifacts / "tracking" / "train").mkdir(parents=True, exist_ok=True)
    (artifacts / "tracking" / "train" / "run.json").write_text(json.dumps({"name": name}))


def test_the_run_before_stands_beside_this_one(tmp_path: Path) -> None:
    prepare(tmp_path)
    run_named(tmp_path, "train-first")
    assert "The run before" not in write(tmp_path, answer_metrics(0.5)).text
    assert "The run before" not in write(tmp_path, answer_metrics(0.5)).text, "measured again, it is the same run"
    run_named(tmp_path, "train-second")
    for _ in range(2):
        text = write(tmp_path, answer_metrics(0.625), train={"steps": 77}).text
        assert "train-first, evaluated" in text and "train.steps" in text and "train.seed" not in text.split("All ")[0]
        row = text[text.index("Image + question → answer") :]
        assert row.index("62.5") < row.index("50.0")
    run_named(tmp_path, "train-third")
    manifest = tmp_path / "prepared" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0123456789abcdef", "fedcba9876543210"))
    assert "The run before" not in write(tmp_path, answer_metrics(0.5)).text, "other data tell nothing"


def test_a_damaged_history_is_named(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(FuselipError, match=r"history\.jsonl has a line that is not JSON"):
        write(tmp_path, answer_metrics())
    assert not (tmp_path / "report").exists()


def test_equal_charts_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw_training(tmp_path / name, [{"step": 1, "lr": 1.0}])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_templates_escape_and_miss_nothing(tmp_path: Path) -> None:
    (tmp_path / "page.html.j2").write_text('<p title="{{ text }}">{{ text }}</p>')
    assert render(tmp_path / "page.html.j2", text='1 < 2"') == '<p title="1 &lt; 2&#34;">1 &lt; 2&#34;</p>'
    with pytest.raises(UndefinedError, match="text"):
        render(tmp_path / "page.html.j2")
    assert data_uri(b"abc", "png") == "data:image/png;base64,YWJj"


@pytest.mark.parametrize(("share", "shown"), [(0, "0.0 %"), (0.0004, "0.04 %"), (0.005, "0.5 %"), (1, "100.0 %")])
def test_small_shares_keep_a_digit(share: float, shown: str) -> None:
    assert percent(share) == shown


def test_no_style_asks_for_anything_outside(artifacts: Path) -> None:
    source = (artifacts / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://(?!here:5000/)", source)
