"""Monitoring: what is kept of rows that were seen, when a difference is an alarm, the page, the server and the flow."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageOps
from prefect_stack import Served, wait_until
from stand_in_embedder import WIDTH, StandIn
from typer.testing import CliRunner

from fuselip_core import Embedder
from fuselip_core.cli.main import app
from fuselip_core.config import MonitorSettings, Settings
from fuselip_core.errors import FuselipError
from fuselip_core.files import read_json
from fuselip_core.monitoring import seen as server_side
from fuselip_core.monitoring.drift import auc_with_interval, compare, domain_auc
from fuselip_core.monitoring.observations import Observations, observe, record, schema_of
from fuselip_core.monitoring.seen import Seen, read_seen
from fuselip_core.search.inputs import Archive
from fuselip_core.serving.api import create_app
from fuselip_core.serving.engine import Engine
from fuselip_core.serving.limits import Limits


def observations(
    rng: np.random.Generator, count: int = 200, shift: float = 0.0, modality: str = "CT", words: int = 5, bad: int = 0
) -> Observations:
    """Images and texts whose vectors point somewhere around one axis, or `shift` away from it."""
    rows = []
    for number in range(count):
        vector = rng.normal(size=WIDTH).astype(np.float32) / 8
        vector[0] += 1.0
        vector[1] += shift
        text = " ".join(["word"] * (words + number % 3)) if number % 2 else None
        name = "" if text else modality if number % 4 else "MR"
        rows.append(record(text is None, text, vector / np.linalg.norm(vector), name, None if text else 0.4))
    return Observations(pa.Table.from_pylist(rows, schema_of(WIDTH)), bad, "a" * 64)


def test_auc_and_its_interval_by_hand() -> None:
    # Of the four pairs three are in order and one is a tie.
    auc, low, high = auc_with_interval(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    assert auc == 3.5 / 4
    # Shares of pairs won: 0.75 and 1 by the positive, 1 and 0.75 over the negative; variances 1/32 each, over 2.
    assert low == pytest.approx(0.875 - 1.96 * np.sqrt(1 / 32 / 2 * 2)) and high == 1.0


def test_the_classifier_tells_what_differs_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    here, there = (observations(rng).vectors("image") for _ in range(2))
    assert domain_auc(here, there)[1] < 0.5 < domain_auc(here, there)[2]
    assert domain_auc(here, here)[0] < 0.5
    assert domain_auc(here, observations(rng, shift=2.0).vectors("image"))[1] > 0.95


def test_each_difference_is_an_alarm_of_its_own() -> None:
    rng = np.random.default_rng(0)
    reference = observations(rng)
    limits = MonitorSettings()

    def alarms(seen: Observations) -> set[str]:
        return {each.name for each in compare(reference, seen, limits) if each.alarm}

    assert alarms(observations(rng)) == set() == alarms(reference)
    assert alarms(observations(rng, modality="US")) == {"modality_distance"}
    assert alarms(observations(rng, words=12)) == {"words_distance"}
    assert alarms(observations(rng, bad=40)) == {"unreadable_share"}
    shifted = {f"{name}/{side}" for name in ("domain_auc", "unfamiliar") for side in ("image", "text")}
    assert alarms(observations(rng, shift=2.0)) == shifted
    # Too few rows to say anything but how many could not be read.
    assert [each.name for each in compare(reference, observations(rng, count=8, shift=2.0), limits)] == [
        "unreadable_share"
    ]


def png(level: int, side: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (side, side), level).save(stream, "PNG")
    return stream.getvalue()


def test_no_image_and_no_text_is_kept(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": png(51), "path": None}, "caption": "a dark secret", "modality": "CT", "split": "train"},
        {"image": {"bytes": b"broken", "path": None}, "caption": "", "modality": "CT", "split": "train"},
        {"image": {"bytes": png(9), "path": None}, "caption": "", "modality": "MR", "split": "test"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    found = observe(tmp_path / "table.parquet", StandIn(), 100, split="train")  # type: ignore[arg-type]
    assert found.unreadable == 1 and found.modalities() == ["CT"]
    assert found.values("words").tolist() == [3.0] and found.values("brightness") == pytest.approx([0.2])
    assert len(found.vectors("image")) == len(found.vectors("text")) == 1
    found.write(tmp_path / "kept.parquet")
    kept = (tmp_path / "kept.parquet").read_bytes()
    assert b"secret" not in kept and png(51)[:8] not in kept
    assert Observations.read(tmp_path / "kept.parquet").table.equals(found.table)
    with pytest.raises(FuselipError, match="holds no observations of this project"):
        Observations.read(tmp_path / "table.parquet")
    with pytest.raises(FuselipError, match="has no rows to compare in its split dev"):
        observe(tmp_path / "table.parquet", StandIn(), 100, split="dev")  # type: ignore[arg-type]


@pytest.fixture
def run(finished_run: Settings, tmp_path: Path) -> Settings:
    """The finished run in a folder of its own."""
    for name in ("model", "prepared", "tracking"):
        shutil.copytree(finished_run.artifacts / name, tmp_path / "artifacts" / name)
    return finished_run.model_copy(update={"artifacts": tmp_path / "artifacts"})


def inverted(prepared: Path, out: Path) -> Path:
    """A table of a prepared data set's pictures, black for white."""
    rows = []
    for row in Archive(prepared).rows(lambda item: None):
        assert isinstance(row.image, bytes)
        stream = io.BytesIO()
        ImageOps.invert(Image.open(io.BytesIO(row.image)).convert("L")).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "caption": row.caption})
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out


def test_a_run_is_quiet_about_its_own_data_and_not_about_other(
    run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)

    def monitor(source: Path) -> tuple[str, dict[str, Any]]:
        done = CliRunner().invoke(app, ["monitor", str(source), "--artifacts", str(run.artifacts)])
        assert done.exit_code == 0, done.output
        return done.output.splitlines()[-1], read_json(run.artifacts / "monitoring" / "findings.json")

    said, found = monitor(run.artifacts / "prepared")
    assert said == "0 alarms" and found["alarms"] == [] and len(found["findings"]) > 4
    said, found = monitor(inverted(run.artifacts / "prepared", tmp_path / "inverted.parquet"))
    assert "Domain classifier, images" in found["alarms"] and said.startswith(f"{len(found['alarms'])} alarms: ")
    page = (run.artifacts / "monitoring" / "index.html").read_text()
    assert page.count('class="alarm"') == len(found["alarms"])
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.stage = 'monitor'", order_by=["attributes.start_time DESC"])
    assert [each.data.metrics["monitor/alarms"] for each in runs] == [len(found["alarms"]), 0]
    assert runs[0].data.metrics["monitor/domain_auc/image"] > 0.9


def test_the_server_notes_what_it_embeds(run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_side, "FILE_ROWS", 2)
    monkeypatch.setattr(server_side, "MOST_FILES", 2)
    embedder = Embedder.from_pretrained(run.artifacts / "model", "cpu")
    engine = Engine("tiny", embedder, None, Limits())
    engine.seen = Seen(tmp_path / "seen")
    picture = base64.b64encode(png(100)).decode()
    with TestClient(create_app(engine), base_url="http://127.0.0.1") as client:

        def ask(*rows: Any) -> httpx.Response:
            return client.post("/v1/embeddings", json={"input": list(rows)})

        assert ask("dropped with the oldest file", "and so is this").status_code == 200
        answer = ask({"image": picture}, {"image": picture, "text": "is it Mr Smith?"})
        assert ask({"image": base64.b64encode(b"nothing").decode()}).status_code == 422
        assert ask("the last one").status_code == 200
    found = read_seen(tmp_path / "seen", embedder.digest)
    assert found.table["side"].to_pylist() == ["image", "both", "text"] and found.unreadable == 1
    assert found.table["words"].to_pylist() == [None, 4, 3]
    assert np.allclose(found.vectors("both")[0], answer.json()["data"][1]["embedding"], atol=1e-6)
    assert all(b"Smith" not in path.read_bytes() for path in (tmp_path / "seen").iterdir())
    with pytest.raises(FuselipError, match="are by other models"):
        read_seen(tmp_path / "seen", "b" * 64)


def test_a_change_of_the_model_begins_another_file(tmp_path: Path) -> None:
    seen = Seen(tmp_path)
    vectors = np.eye(2, WIDTH, dtype=np.float32)
    seen.add([(False, "one"), (False, "two")], vectors, "a" * 64)
    seen.add([(True, None)], vectors[:1], "b" * 64)
    seen.close()
    seen.close()
    assert [len(read_seen(tmp_path, letter * 64).table) for letter in "ab"] == [2, 1]


@pytest.fixture
def served(prefect_served: Served) -> Iterator[Served]:
    yield prefect_served
    for name in ("artifacts/model", "artifacts/prepared", "artifacts/monitoring"):
        shutil.rmtree(prefect_served.repository / name, ignore_errors=True)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_drift_found_by_the_deployment_can_start_the_adaptation(served: Served, run: Settings, tmp_path: Path) -> None:
    for name in ("model", "prepared"):
        shutil.copytree(run.artifacts / name, served.repository / "artifacts" / name, dirs_exist_ok=True)
    (automation,) = served.post("automations/filter", {})
    assert automation["trigger"]["expect"] == ["fuselip.drift"] and not automation["enabled"]
    httpx.patch(f"{served.api}/automations/{automation['id']}", json={"enabled": True}).raise_for_status()
    try:
        seen = inverted(run.artifacts / "prepared", tmp_path / "inverted.parquet")
        started = served.start("monitor/monitor", request={"seen": str(seen)})
        state = served.wait(started, {"Completed"})["state"]
        assert "Domain classifier, images" in state["message"]
        deployment = served.get("deployments/name/pipeline/readapt")["id"]
        wanted = {"deployments": {"id": {"any_": [deployment]}}}
        (adaptation,) = wait_until(lambda: served.post("flow_runs/filter", wanted), "the start of the adaptation")
        served.wait(adaptation["id"], {"Completed"})
    finally:
        httpx.patch(f"{served.api}/automations/{automation['id']}", json={"enabled": False}).raise_for_status()
    (artifact,) = served.post("artifacts/filter", {"artifacts": {"key": {"any_": ["monitoring"]}}})
    assert "| Domain classifier, images |" in artifact["data"]
    assert json.loads((served.repository / "artifacts" / "monitoring" / "findings.json").read_text())["alarms"]
