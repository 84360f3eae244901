"""Monitoring of a model's inputs: reference and seen rows → findings, a page, and metrics in MLflow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fuselip_core.config import Settings
from fuselip_core.files import atomic_folder, write_json
from fuselip_core.html import render
from fuselip_core.monitoring.drift import Finding, compare
from fuselip_core.monitoring.observations import Observations, observe
from fuselip_core.monitoring.seen import OBSERVED, read_seen
from fuselip_core.tracking.run import data_version, open_run

TEMPLATE = Path(__file__).with_name("page.html.j2")
FOLDER, REFERENCE = "monitoring", "reference.parquet"


def monitor(settings: Settings, source: Path, model: str | None = None, kind: str | None = None) -> list[Finding]:
    """Compares `source`, an archive or a server's observations, with the training split of the run's prepared data.

    Writes index.html and findings.json into monitoring/ below the run's artifacts. `model`: by default the run's own.
    """
    from fuselip_core import Embedder

    artifacts = settings.artifacts
    embedder = Embedder.from_pretrained(model or str(artifacts / "model"))
    limit = settings.monitor.rows
    if source.is_dir() and any(source.glob(OBSERVED)):
        seen = read_seen(source, embedder.digest)
    else:
        seen = observe(source, embedder, limit, kind)
    version = data_version(artifacts)
    known = artifacts / f"{FOLDER}-{REFERENCE}"
    reference = Observations.read(known) if known.is_file() else None
    if reference is None or (reference.digest, reference.of) != (embedder.digest, f"{version}/{limit}"):
        reference = dataclasses.replace(
            observe(artifacts / "prepared", embedder, limit, split="train"), of=f"{version}/{limit}"
        )
        reference.write(known)
    findings = compare(reference, seen, settings.monitor)
    _write(settings, source, findings)
    return findings


def _write(settings: Settings, source: Path, findings: Sequence[Finding]) -> None:
    alarms = [each.title for each in findings if each.alarm]
    about = {
        "source": source.name,
        "recipe": settings.recipe,
        "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "alarms": alarms,
    }
    with atomic_folder(settings.artifacts / FOLDER) as folder:
        write_json(folder / "findings.json", about | {"findings": [dataclasses.asdict(each) for each in findings]})
        page = render(TEMPLATE, findings=findings, **about)
        (folder / "index.html").write_text(page, encoding="utf-8")
    with open_run(settings, "monitor") as run:
        run.metrics({f"monitor/{each.name}": each.value for each in findings} | {"monitor/alarms": len(alarms)})
        run.artifact(settings.artifacts / FOLDER, FOLDER)
