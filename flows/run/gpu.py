"""Shares this machine's GPUs: a stage that needs one takes a slot of a concurrency limit on Prefect's server.

`make serve-flows` makes the limit, with as many slots as there are GPUs. Where there is none, as on the server that
`make demo` starts for itself, nobody waits. Another GPU machine with a worker gets its own:
``prefect gcl create gpu-HOSTNAME --limit 1``.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import State
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Running

from flows.run.child import OnLine
from flows.run.processes import LABEL

STAGES = ("codebook", "tokenize", "train", "evaluate")
# The slot of a run that was killed is free again after so long; a run that lives renews it all the time.
LEASE_SECONDS = 90.0
WAITING = "Waiting for a GPU"  # a state's name, by which Prefect's list of runs can be filtered


def limit_name() -> str:
    """Name of this machine's limit."""
    return f"gpu-{socket.gethostname()}"


@contextlib.contextmanager
def gpu_slot(stage: str, on_line: OnLine) -> Iterator[None]:
    """Holds one of this machine's GPUs for `stage` of the current flow run, and says so if it has to wait."""
    name = limit_name()
    if stage not in STAGES:
        yield
        return
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            limit = None
        waits = limit is not None and limit.active_slots >= limit.limit
        why = f"waiting for a GPU: {_others(client)} all of {name} ({limit.limit})" if limit and waits else ""
    if limit is None:
        yield
        return
    if waits:
        on_line(why)
        _show(Running(name=WAITING, message=why))
    run_id = flow_run.get_id()
    with concurrency(
        name,
        lease_duration=LEASE_SECONDS,
        holder=ConcurrencyLeaseHolder(type="flow_run", id=UUID(run_id)) if run_id else None,
        # If the server cannot be reached for a while, the run loses its slot and not its work.
        raise_on_lease_renewal_failure=False,
    ):
        if waits:
            _show(Running(message=f"got a GPU of {name}"))
        yield


def _others(client: SyncPrefectClient) -> str:
    """Who has the GPUs, by the names of this machine's other runs that do not wait."""
    running = client.read_flow_runs(flow_run_filter=FlowRunFilter(state={"name": {"any_": ["Running"]}}))
    names = [
        run.name
        for run in running
        if str(run.id) != flow_run.get_id() and str(run.labels.get(LABEL, "")).startswith(f"{socket.gethostname()}:")
    ]
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}" if names else "other runs have"


def _show(state: State[Any]) -> None:
    """Gives the current flow run a state that its page, and the list of runs, say."""
    if run_id := flow_run.get_id():
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(run_id), state, force=True)
