"""Flows for `fuselip embed` and `fuselip index`, to run on a schedule or from Prefect's page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed
from pydantic import Field

from flows.environment import REPOSITORY
from flows.page.flow_run import flow_url, name_flow_run, sign
from flows.page.progress import ProgressArtifact
from flows.run.child import stream
from flows.run.forms import Form, empty
from flows.run.runner import LastLines, stage_environment
from flows.tasks import INTERRUPTED, RUNNER, RunnerName, error_of, stoppable, task_log
from fuselip_core.errors import Interrupted
from fuselip_core.search import DEFAULT_INDEX, DEFAULT_MODEL


class ArchiveRequest(Form):
    """What to read, and with which model."""

    archive: Path = Field(
        Path("artifacts/prepared"), description="Folder of pictures or DICOM files, prepared data, or a table."
    )
    model: str = Field(DEFAULT_MODEL, description="models:/NAME@ALIAS, a folder, or a hub id.")
    kind: str | None = empty("Kind of data set (`fuselip data sources`). Empty: found out.")

    def words(self) -> list[str]:
        """What to say to ``fuselip`` behind the verb."""
        return [str(self.archive), "--model", self.model, *(["--kind", self.kind] if self.kind else [])]


class EmbedRequest(ArchiveRequest):
    """An archive, and the file of its vectors."""

    out: Path = Field(Path("embeddings.parquet"), description="Parquet file, from the repository's root.")


class IndexRequest(ArchiveRequest):
    """An archive, and its index."""

    index: str = Field(DEFAULT_INDEX, description="Folder of the index in the repository, or an s3:// address.")
    action: Literal["update", "build", "add"] = Field(
        "update",
        description="update: build it again if the model is another one now, else add; build: replace it when the new "
        "one is whole; add: embed what is new or has changed.",
    )


SAMPLE_VECTORS, SAMPLE_INDEX = EmbedRequest(), IndexRequest()


@flow(name="embed")
def embed(request: EmbedRequest = SAMPLE_VECTORS, runner: RunnerName = RUNNER) -> Any:
    """Writes the vectors of an archive to a Parquet file; a run that was stopped resumes.

    Args:
        request: What to embed, with which model, and where to.
        runner: Where it runs: in a process on the worker's machine, or in the project's search container there.
    """
    return _run("embed", request.archive.name, ["embed", *request.words(), "--out", str(request.out)], runner)


@flow(name="index")
def index(request: IndexRequest = SAMPLE_INDEX, runner: RunnerName = RUNNER) -> Any:
    """Brings the index of an archive up to date. On a schedule it follows the champion: where the alias means another
    model, the index is built again beside the old one, which is searched until the new one is whole.

    Args:
        request: What to index, with which model, and where to.
        runner: Where it runs: in a process on the worker's machine, or in the project's search container there.
    """
    words = ["index", request.action, *request.words(), "--index", request.index]
    return _run("index", request.archive.name, words, runner)


def _run(kind: str, name: str, words: list[str], runner: RunnerName) -> Any:
    sign()
    name_flow_run(kind, name)
    state: Any = fuselip_task(kind, words, runner, return_state=True)
    if error := error_of(state):
        return Failed(message=error)
    return Completed(message=state.message)


@task(name="fuselip", task_run_name="{kind}", cache_policy=NO_CACHE)
@stoppable
def fuselip_task(kind: str, words: list[str], runner: RunnerName) -> Any:
    """Runs a verb of ``fuselip`` in a process or container of its own, and completes with its last line."""
    progress = ProgressArtifact(kind, task_log())
    lines = LastLines(progress)
    environment = stage_environment(REPOSITORY, flow_url=flow_url())
    module = "flows.run.container" if runner == "docker" else "fuselip_core"
    code = stream([sys.executable, "-m", module, *words], REPOSITORY, environment, lines)
    if code:
        return Failed(name=INTERRUPTED if code == Interrupted.exit_code else None, message=lines.message(code))
    progress.close()
    return Completed(message=lines.message(0))
