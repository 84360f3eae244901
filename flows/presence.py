"""Which process runs a flow run, noted on it, so that flows/server/recover.py can tell later whether that process is gone."""

from __future__ import annotations

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.run.processes import Process

LABEL = "fuselip.process"


def sign() -> None:
    """Notes on the current flow run which process runs it."""
    if run_id := flow_run.get_id():
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(UUID(run_id), {LABEL: str(Process.current())})
