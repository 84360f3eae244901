"""The champion changes: Prefect's deployment builds the index again, and the server that runs goes over to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from prefect_stack import Served
from tiny_model import save_tiny_model

from fuselip_core.config import RegisterSettings, load_settings
from fuselip_core.registry.register import promote, register_model
from fuselip_core.search.index import Index
from fuselip_core.serving import engine as serving
from fuselip_core.serving.api import create_app
from fuselip_core.serving.limits import Limits

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
MODEL = "models:/archive-tiny@champion"
PATIENCE = 120.0


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registry with two versions of a model; the first is the champion."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    settings = load_settings(recipe="sample", artifacts=tmp_path / "artifacts")
    settings = settings.model_copy(update={"register_": RegisterSettings(name="archive", gates=())})
    for seed in (0, 1):
        register_model(settings, save_tiny_model(tmp_path / f"model-{seed}", seed), {"seed": seed}, width=128)
    promote("archive-tiny", 1, "champion")
    return uri


def eventually(happened: Callable[[], bool]) -> None:
    late = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < late
        time.sleep(0.3)


def test_the_index_and_the_server_follow_the_champion(
    prefect_served: Served, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, index = tmp_path / "archive", tmp_path / "index"
    archive.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(archive / f"{number}.png")
    asked = {"archive": str(archive), "model": MODEL, "index": str(index)}

    def run() -> str:
        started = prefect_served.start(
            "index/index", {"MLFLOW_TRACKING_URI": registry}, request=asked, runner="process"
        )
        return str(prefect_served.wait(started, {"Completed"})["state"]["message"])

    assert "5 rows embedded" in run()
    first = Index.open(index)
    assert first.model_address == "models:/archive-tiny/1"
    monkeypatch.setattr(serving, "FOLLOW_SECONDS", 0.3)
    engine = serving.open_engine(None, index, Limits())
    assert engine.name == MODEL
    with TestClient(create_app(engine), base_url="http://127.0.0.1") as client:

        def search() -> Any:
            return client.post("/v1/search", json={"text": "left", "limit": 5})

        def digest() -> str:
            return str(client.get("/info").json()["index"]["model_digest"])

        assert "5 unchanged" in run() and search().status_code == 200
        promote("archive-tiny", 2, "champion")
        # Started anew before the index is built again, a server goes on with the model that fits the index.
        assert serving.open_engine(None, index, Limits()).embedder.digest == first.model_digest
        assert search().status_code == 200 and digest() == first.model_digest
        assert "5 rows embedded" in run()
        second = Index.open(index)
        assert second.model_address == "models:/archive-tiny/2" and second.model_digest != first.model_digest
        eventually(lambda: digest() == second.model_digest)
        assert engine.embedder.digest == second.model_digest
        expected = second.search(engine.embedder.embed(None, ["left"])[0], limit=5)
        assert [hit["id"] for hit in search().json()["data"]] == [hit.id for hit in expected]
