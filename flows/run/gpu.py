"""Shares this machine's GPUs: a stage that needs one takes a slot of a concurrency limit on Prefect's server.

`make serve-flows` makes the limit, with as many slots as there are GPUs. Where there is none, as on the server that
`make demo` starts for itself, nobody waits. Another GPU machine with a worker gets its own:
``prefect gcl create gpu-HOSTNAME --limit 1``.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from flows.run.child import OnLine

STAGES = ("codebook", "tokenize", "train", "evaluate")
# The slot of a run that was killed is free again after so long; a run that lives renews it all the time.
LEASE_SECONDS = 90.0


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
    try:
        with get_client(sync_client=True) as client:
            limit = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        yield
        return
    if limit.active_slots >= limit.limit:
        on_line(f"waiting for a GPU: other runs have taken all of {name} ({limit.limit})")
    run_id = flow_run.get_id()
    with concurrency(
        name,
        lease_duration=LEASE_SECONDS,
        holder=ConcurrencyLeaseHolder(type="flow_run", id=UUID(run_id)) if run_id else None,
        # If the server cannot be reached for a while, the run loses its slot and not its work.
        raise_on_lease_renewal_failure=False,
    ):
        yield
