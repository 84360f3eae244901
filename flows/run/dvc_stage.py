"""One DVC stage in a process of its own: ``python -m flows.run.dvc_stage dvc.yaml:train``.

DVC decides whether the stage is stale. Exit codes: 0 it ran, 3 nothing had changed, 75 it was asked to stop and saved
its state, 1 it failed. Its own process, since DVC and the stage write to the terminal and are ended together.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import re
import signal
import sys

UNCHANGED = 3
# Of Linux's prctl: the signal that this process gets when its parent ends.
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Reproduces the stage named on the command line; an error is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m flows.run.dvc_stage", description=__doc__)
    parser.add_argument("address", help="dvc.yaml and stage, for example dvc.yaml:train")
    parser.add_argument("--force", action="store_true", help="run the stage even if nothing has changed")
    arguments = parser.parse_args()
    _end_with_parent()
    from dvc.repo import Repo
    from dvc.stage.exceptions import StageCmdFailedError

    logging.getLogger("dvc").setLevel(logging.WARNING)
    try:
        with Repo() as repo:
            done = repo.reproduce(arguments.address, single_item=True, force=arguments.force)
    except Exception as error:  # what DVC raises on a damaged file is not always its own
        last = _causes(error)[-1]
        if isinstance(last, StageCmdFailedError):
            return _exit_code(str(last))
        sys.stderr.write(f"error: {dvc_sentence(error)}{_remedy(arguments.address, str(error))}\n")
        return 1
    return 0 if done else UNCHANGED


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


def _exit_code(sentence: str) -> int:
    """The stage's exit code, which DVC tells only in words; as in a shell, 128 and more for one ended by a signal.

    A stage that ends with an error has said why. One ended from outside has not, so this says it.
    """
    found = re.search(r"exited with (-?\d+)$", sentence)
    code = int(found[1]) if found else 1
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; most likely this machine ran out of memory" if code == -signal.SIGKILL else ""
    sys.stderr.write(f"error: the stage was ended from outside by {name}{hint}; the same command goes on\n")
    return 128 - code


def dvc_sentence(error: BaseException) -> str:
    """What DVC says, with its reasons, on one line."""
    reasons = dict.fromkeys(" ".join(str(cause).split()) for cause in _causes(error))
    return f"DVC: {': '.join(reasons)}"


def _remedy(address: str, said: str) -> str:
    """What to do where DVC cannot read a file of its own."""
    if "Could not find" in said:  # a value that dvc.yaml takes from params.yaml
        return "; bring params.yaml back with git"
    if "dvc.lock" in said:
        lock = address.partition(":")[0].removesuffix("yaml") + "lock"
        return f"; bring {lock} back with git, or delete it: what DVC's cache holds is not made anew"
    if "dvc.yaml" in said:  # a run's is a copy of the root's
        return "; bring dvc.yaml back with git"
    return ""


def _causes(error: BaseException | None) -> list[BaseException]:
    causes = []
    while error:
        causes.append(error)
        error = error.__cause__
    return causes


if __name__ == "__main__":
    sys.exit(main())
