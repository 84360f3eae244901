"""Fetches a data set and keeps its version with DVC. ``python -m flows.download --help``."""

from __future__ import annotations

import json
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.states import Completed, Failed
from pydantic import Field, WithJsonSchema

from flows.command_line import run_from_command_line
from flows.environment import REPOSITORY
from flows.page.flow_run import flow_url, name_flow_run, sign
from flows.page.progress import ProgressArtifact
from flows.run.child import stream
from flows.run.forms import Form, empty
from flows.run.lock import dvc_lock
from flows.run.runner import LastLines, stage_environment
from flows.tasks import INTERRUPTED, RUNNER, RunnerName, error_of, may_pass, stoppable, task_log
from fuselip_core.errors import Interrupted
from fuselip_core.files import read_json

# Read as it is: the worker's image has not all that fuselip_core/data/download/hosts.py needs.
ORIGINS = read_json(Path(str(files("fuselip_core.data.download") / "origins.json")))
KNOWN = "; ".join(f"{name}: {origin['note']}" for name, origin in ORIGINS.items())
Source = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "examples": list(ORIGINS)})]
RETRY_AFTER: list[float] = [60, 600]


class DownloadRequest(Form):
    """What to fetch, and where to."""

    source: Source = Field(
        "rocov2", description=f"Name of a data set, hub:OWNER/NAME, zenodo:RECORD, or an address. Names: {KNOWN}."
    )
    folder: Path = Field(Path("ROCOv2_data"), description="Folder of the files, from the repository's root.")
    revision: str | None = empty("Commit, branch or tag of a Hub data set. Empty: its main branch.")
    include: tuple[str, ...] = Field((), description="Globs of files to fetch. Empty: the data set's own choice.")
    verify: bool = Field(False, description="Check the checksums of files that are there already.")
    keep_version: bool = Field(
        True,
        description="Keep this version with DVC (`dvc add`), so that a model can be made again from the same bytes; "
        "it takes the data set's size a second time unless the file system shares blocks.",
    )

    def words(self) -> list[str]:
        """What to say to ``fuselip``."""
        words = ["data", "download", self.source, "--out", str(self.folder)]
        words += ["--revision", self.revision] if self.revision else []
        words += [word for glob in self.include for word in ("--include", glob)]
        return words + (["--verify"] if self.verify else [])


ROCOV2 = DownloadRequest()


@flow(name="download")
def download(request: DownloadRequest = ROCOV2, runner: RunnerName = RUNNER) -> Any:
    """Fetches a data set, resumes an interrupted download, and keeps the version with DVC.

    Args:
        request: What to fetch, and where to.
        runner: Where it runs: in a process on the worker's machine, or in the project's download container there.
    """
    sign()
    name_flow_run("download", request.source.split(":")[-1].strip("/").split("/")[-1])
    if error := _misplaced(request, runner):
        return Failed(message=error)
    fetched: Any = fetch_task(request, runner, return_state=True)
    if error := error_of(fetched):
        return Failed(message=error)
    kept: Any = keep_task(request.folder, return_state=True) if _is_ours(request) and request.keep_version else None
    if kept and (error := error_of(kept)):
        return Failed(message=error)
    _publish(fetched.result(), kept)
    return Completed(message=f"{request.source} is in {request.folder}")


@task(
    name="fetch",
    task_run_name="fetch",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
@stoppable
def fetch_task(request: DownloadRequest, runner: RunnerName) -> Any:
    """Completes with the download's summary; a network failure is tried again later."""
    module = "flows.run.container" if runner == "docker" else "fuselip_core"
    progress = ProgressArtifact("download", task_log())
    lines = LastLines(progress)
    environment = stage_environment(REPOSITORY, flow_url=flow_url()) | {"FUSELIP_REPOSITORY": str(REPOSITORY)}
    code = stream([sys.executable, "-m", module, *request.words()], REPOSITORY, environment, lines)
    if code:
        name = INTERRUPTED if code == Interrupted.exit_code else None
        return Failed(name=name, message=f"download: {lines.message(code)}")
    progress.close()
    return Completed(message=f"{request.source} fetched", data=_read_summary(lines.message(0)))


@task(name="keep", task_run_name="keep", cache_policy=NO_CACHE)
@stoppable
def keep_task(folder: Path) -> Any:
    """Keeps the version with DVC: ``<folder>.dvc`` names its bytes; commit it."""
    lines = LastLines(task_log())
    command = [sys.executable, "-m", "dvc", "add", "--quiet", str(folder)]
    with dvc_lock(REPOSITORY, f"{folder}.dvc (process {os.getpid()})", lines) as descriptor:
        code = stream(command, REPOSITORY, stage_environment(REPOSITORY), lines, keep_open=(descriptor,))
    if code:
        return Failed(message=f"dvc add {folder}: {lines.message(code)}")
    return Completed(message=f"{folder}.dvc")


def _is_ours(request: DownloadRequest) -> bool:
    return (REPOSITORY / request.folder).resolve().is_relative_to(REPOSITORY.resolve())


def _misplaced(request: DownloadRequest, runner: RunnerName) -> str | None:
    if runner == "docker" and not _is_ours(request):
        return f"the download container sees only {REPOSITORY}; choose a folder below it, not {request.folder}"
    if (REPOSITORY / request.folder).resolve() == REPOSITORY.resolve():
        return "the data set needs a folder of its own below the repository, such as ROCOv2_data"
    return None


def _read_summary(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _publish(summary: dict[str, Any], kept: State[Any] | None) -> None:
    lines = [f"- {name}: {value}" for name, value in summary.items()]
    lines += [f"- version: `{kept.message}`, to be committed"] if kept else []
    create_markdown_artifact(key="download", markdown="\n".join(lines) + "\n", description="What was fetched")


if __name__ == "__main__":
    run_from_command_line(download, DownloadRequest)
