"""Compares a run with the previous run in the same folder: results, and settings that differ.

The results of both are stored in tracking/results.json, which no stage deletes.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fuselip_core.config import Settings
from fuselip_core.evaluation.report.comparison import result_rows
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.files import find_json, write_json
from fuselip_core.tracking.events import flat
from fuselip_core.tracking.run import data_version, run_of

HEAD = ("", "this run", "the run before", "chance or control")


def beside_run_before(settings: Settings, result: EvaluationResult) -> dict[str, Any] | None:
    """Stores the results of this run; returns the section on the run before, or None if there is none on the same data.

    Evaluating a model again replaces its results, and does not make it the run before.
    """
    run, path = run_of(settings.artifacts), settings.artifacts / "tracking" / "results.json"
    if not (name := run.get("name")):
        return None
    asked = settings.model_dump(mode="json", by_alias=True, exclude={"artifacts"})
    asked["commit"] = str(run.get("tags", {}).get("git_commit", ""))[:10]
    latest = {
        "run": name,
        "measured": f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        "data": [data_version(settings.artifacts), result.split],
        "settings": dict(flat(asked)),
        "numbers": result.numbers(),
    }
    known = find_json(path)
    before = known.get("before" if known.get("latest", {}).get("run") == name else "latest")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"latest": latest, "before": before})
    if not before or before["data"] != latest["data"]:
        return None
    old, new = before["settings"], latest["settings"]
    changed = sorted(field for field in old.keys() | new.keys() if old.get(field) != new.get(field))
    return {
        "run": before["run"],
        "measured": before["measured"],
        "changed": [(field, str(old.get(field, "")), str(new.get(field, ""))) for field in changed],
        "head": HEAD,
        "rows": result_rows({"now": latest["numbers"], "before": before["numbers"]}),
    }
