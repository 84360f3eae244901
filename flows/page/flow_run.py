"""A flow run's name, and labels that tell which process runs it."""

from __future__ import annotations

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_UI_URL

from flows.run.folder import Run
from flows.run.processes import HEARTBEAT, LABEL, Process
from fuselip_core.files import find_json


def run_name(run: Run, with_data: bool) -> str:
    """``rocov2-tiny-small-1a2b3c4d``: recipe, size, and the data's version unless it may still change."""
    recipe, size = run.settings.recipe, run.settings.model.size
    name = recipe if recipe.endswith(f"-{size}") else f"{recipe}-{size}"
    version = find_json(run.artifacts / "prepared" / "manifest.json").get("data_version") if with_data else None
    return f"{name}-{str(version)[:8]}" if version else name


def name_flow_run(*parts: str | None) -> None:
    """Names the current flow run, if there is one; the start of its id at the end keeps the names distinct."""
    if run_id := flow_run.get_id():
        name = "-".join(part for part in (*parts, run_id[:6]) if part)
        with get_client(sync_client=True) as client:
            client.set_flow_run_name(UUID(run_id), name)


def flow_url() -> str | None:
    """Address of the current flow run's page; None without a server that outlives it."""
    base, run_id = PREFECT_UI_URL.value(), flow_run.get_id()
    return f"{base}/runs/flow-run/{run_id}" if base and run_id and PREFECT_API_URL.value() else None


def sign() -> None:
    """Notes on the current flow run which process runs it, and how often that sends a sign of life."""
    if run_id := flow_run.get_id():
        heartbeat = PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() or 0
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(UUID(run_id), {LABEL: str(Process.current()), HEARTBEAT: heartbeat})
