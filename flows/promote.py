"""Moves the alias of a registered model to another version. ``python -m flows.promote --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed
from pydantic import Field

from flows.command_line import run_from_command_line
from flows.page.flow_run import name_flow_run
from flows.run.forms import Form, empty
from flows.tasks import error_of
from fuselip_core.errors import FuselipError


class PromoteRequest(Form):
    """Which version the alias shall point to."""

    name: str = Field("fuselip-rocov2-base", pattern=r"^[A-Za-z0-9._-]+$", description="Registered model.")
    version: int | None = empty("Version to promote. Empty: the newest.", ge=1)
    alias: str = Field(
        "champion", pattern=r"^[a-z][a-z0-9_-]*$", description="Alias to move; what is served follows it."
    )
    despite_gates: bool = Field(False, description="Move the alias even if the version missed a gate.")


NEWEST = PromoteRequest()


@flow(name="promote")
def promote(request: PromoteRequest = NEWEST) -> Any:
    """Moves an alias of MLflow's registry, back as well as forward.

    Args:
        request: Which version the alias shall point to.
    """
    name_flow_run("promote", request.name)
    moved = alias_task(request, return_state=True)
    if error := error_of(moved):
        return Failed(message=error)
    create_markdown_artifact(key="promotion", markdown=f"{moved.message}\n", description="Where the alias points now")
    return Completed(message=moved.message)


@task(name="alias", task_run_name="alias", cache_policy=NO_CACHE)
def alias_task(request: PromoteRequest) -> Any:
    """Completes with the alias' version, now and before."""
    from fuselip_core.registry.register import promote as move

    try:
        moved = move(request.name, request.version, request.alias, request.despite_gates)
    except FuselipError as error:
        return Failed(message=str(error))
    before = f"version {moved['before']}" if moved["before"] else "nothing"
    return Completed(message=f"{moved['name']}@{moved['alias']} is version {moved['version']}, it was {before}")


if __name__ == "__main__":
    run_from_command_line(promote, PromoteRequest)
