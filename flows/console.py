"""A flow on the command line: its options, what it prints, and its exit code."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from prefect import Flow
from prefect.client.schemas import State
from pydantic import ValidationError
from rich.console import Console

from flows.environment import REPOSITORY
from flows.runs import RunRequest, open_run_folder
from flows.steps import Ending, RunnerName
from flows.summary import print_summary
from fuselip_core.config import SourceName
from fuselip_core.errors import FuselipError


def run_from_command_line(flow: Flow[Any, Any], arguments: Sequence[str] | None = None) -> None:
    """Runs `flow` and ends the process: 0 if all went well, 1 with one line on stderr if not, 2 for a wrong option."""
    options = _parser(flow).parse_args(arguments)
    try:
        request = RunRequest(
            source=options.source,
            root=options.root,
            recipe=options.recipe,
            overrides=tuple(options.set),
            name=options.name,
        )
        # Looked at before Prefect's server starts, which takes a while.
        open_run_folder(REPOSITORY, request)
    except ValidationError as error:
        _fail(str(error.errors()[0]["msg"]), code=2)
    except FuselipError as error:
        _fail(str(error), code=error.exit_code)
    # Ending this process must end the stage it waits for: an exception does, the signal's default would not.
    signal.signal(signal.SIGTERM, _raise_exit)
    if sys.stderr.isatty():
        _hide_shown_lines()
    state: State[Any] = flow(request, options.runner, return_state=True)  # type: ignore[assignment]
    if not state.is_completed():
        _fail(state.message or str(state.name), code=1)
    ending = state.result()
    if isinstance(ending, Ending):
        print_summary(ending, Console())


def _parser(flow: Flow[Any, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m flows.{flow.name}", description=flow.description)
    parser.add_argument("--source", choices=get_args(SourceName), help="kind of data set; params.yaml's if not given")
    parser.add_argument("--root", type=Path, help="folder of the raw data set; the recipe's if not given")
    parser.add_argument("--recipe", help="recipe to start from; the source's if not given")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override of a field")
    parser.add_argument("--name", help="folder below runs/; the source's name if not given")
    parser.add_argument("--runner", choices=get_args(RunnerName), default="process", help="where stages run")
    return parser


def _hide_shown_lines() -> None:
    """The stage writes to this terminal itself: Prefect's console need not say it again, its server still gets it."""
    for handler in logging.getLogger("prefect").handlers:
        handler.addFilter(lambda record: not getattr(record, "shown", False))


def _raise_exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _fail(sentence: str, code: int) -> None:
    Console(stderr=True).print(f"error: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)
