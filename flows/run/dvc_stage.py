"""One DVC stage in a process of its own: ``python -m flows.run.dvc_stage dvc.yaml:train``.

DVC decides whether the stage is stale. Exit codes: 0 it ran, 3 nothing had changed, else the stage's own (75: it was
asked to stop and saved its state). A process of its own, since DVC and the stage write to the terminal and are ended
together.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.run.child import OnLine
from flows.run.lock import dvc_lock
from fuselip_core.errors import FuselipError, run_to_exit

UNCHANGED = 3
# Of Linux's prctl: the signal that this process gets when its parent ends.
PR_SET_PDEATHSIG = 1


def main(
    address: Annotated[str, typer.Argument(help="dvc.yaml and stage, for example dvc.yaml:train.")],
    force: Annotated[bool, typer.Option("--force", help="Run the stage even if nothing has changed.")] = False,
) -> None:
    """Reproduce one DVC stage."""
    _end_with_parent()
    raise typer.Exit(reproduce(address, force))


def reproduce(address: str, force: bool) -> int:
    """Runs the stage if DVC finds it stale and returns the exit code; raises FuselipError for what DVC refuses."""
    from dvc.stage import run as stage_run

    class StageEnded(stage_run.StageCmdFailedError):
        """How the stage's command ended: DVC's own exception has the exit code only in its wording."""

        def __init__(self, command: str, status: int) -> None:
            super().__init__(command, status)
            self.status = status

    stage_run.StageCmdFailedError = StageEnded
    logging.getLogger("dvc").setLevel(logging.WARNING)
    try:
        with dvc_repo(Path.cwd()) as repo:
            # First, since the stage's params are in the file that this stage writes.
            repo.reproduce(settings_of(address), single_item=True)
            done = repo.reproduce(address, single_item=True, force=force)
    except Exception as error:  # what DVC raises on a damaged file is not always its own
        last = _causes(error)[-1]
        if isinstance(last, StageEnded):
            return _exit_code(last.status)
        raise dvc_problem(error) from error
    return 0 if done else UNCHANGED


def dvc_repo(folder: Path) -> Any:
    """DVC's repository in `folder`, for `with`; a source archive, which has no .git, is one too.

    Its remote is FUSELIP_STORE where that is set, else the one that .dvc/config names.
    """
    from dvc.repo import Repo

    config: dict[str, Any] = {"core": {}}
    if not any((place / ".git").exists() for place in (folder, *folder.parents)):
        config["core"]["no_scm"] = True
    if store := os.environ.get("FUSELIP_STORE"):
        config["core"]["remote"] = "store"
        config["remote"] = {"store": {"url": f"{store.rstrip('/')}/dvc"}}
    return Repo(str(folder), config=config)


def transfer(repository: Path, verb: str, target: Path, on_line: OnLine, **options: Any) -> None:
    """``dvc pull`` or ``dvc push`` of `target`, once no other command of DVC runs here; raises FuselipError."""
    with dvc_lock(repository, f"dvc {verb} {target} (process {os.getpid()})", on_line), dvc_repo(repository) as repo:
        try:
            getattr(repo, verb)(targets=[str(target)], **options)
        except Exception as error:  # what DVC raises is not always its own
            raise dvc_problem(error) from error


def settings_of(address: str) -> str:
    """The address of the stage that resolves the settings for the one at `address`."""
    return f"{address.rpartition(':')[0]}:settings"


def _end_with_parent() -> None:
    """Lets SIGTERM stop the stage alone, and sends it if the flow's process is killed: a stage never runs unseen.

    SIGTERM comes to the whole group: the stage saves its state, and this process waits for it to tell how it ended.
    From a dying parent it comes to this process only, which passes it on.
    """
    parent = os.getppid()

    def pass_on(number: int, frame: object) -> None:
        if os.getppid() != parent:
            signal.signal(signal.SIGTERM, lambda *_: None)
            os.killpg(os.getpgrp(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _exit_code(status: int) -> int:
    """The stage's exit code; as in a shell, 128 and more for one that a signal ended.

    A stage that ends with an error has said why. One that a signal ended has not, so this says it. DVC starts stages
    through a shell: some replace themselves by the command, others stay, and then tell of the signal by their own code.
    """
    number = -status if status < 0 else status - 128
    if number not in set(signal.Signals):
        return status
    name = signal.Signals(number).name
    hint = "; most likely this machine ran out of memory" if number == signal.SIGKILL else ""
    sys.stderr.write(f"error: the stage was ended from outside by {name}{hint}; the same command resumes it\n")
    return 128 + number


def dvc_problem(error: Exception) -> FuselipError:
    """What DVC says, with its causes, and what to do if a file of DVC is damaged."""
    causes = _causes(error)
    said = ": ".join(dict.fromkeys(" ".join(str(cause).split()) for cause in causes))
    damaged = next((name for cause in causes if (name := _damaged_file(cause))), None)
    if damaged is None:
        return FuselipError(f"DVC: {said}")
    if damaged.endswith("dvc.lock"):
        return FuselipError(f"DVC: {said}; restore {damaged} with git, or delete it: outputs in DVC's cache are kept")
    # A run's dvc.yaml is a copy of the root's.
    name = "dvc.yaml" if damaged.endswith("dvc.yaml") else damaged
    return FuselipError(f"DVC: {said}; restore {name} with git")


def _damaged_file(cause: Any) -> str | None:
    """The file that DVC can't read, by the kind of its exception."""
    from dvc.config import ConfigError
    from dvc.parsing import ResolveError
    from dvc.utils.serialize import ParseError
    from dvc.utils.strictyaml import YAMLValidationError

    if isinstance(cause, ParseError | YAMLValidationError):
        name = os.path.normpath(cause.path)
        # DVC names files from the current folder, which may be another than the repository.
        return Path(name).name if name.startswith("..") else name
    if isinstance(cause, ResolveError):  # a value that dvc.yaml takes from params.yaml
        return "params.yaml"
    return ".dvc/config" if isinstance(cause, ConfigError) else None


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    return causes


if __name__ == "__main__":
    run_to_exit(lambda: typer.run(main))
