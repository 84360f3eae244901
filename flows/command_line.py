"""A flow on the command line: its options, what it prints, and its exit code."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from prefect import Flow
from prefect.client.schemas import State
from prefect.logging.handlers import PrefectConsoleHandler
from pydantic import BaseModel, ValidationError
from rich.console import Console

from flows.environment import REPOSITORY
from flows.page.summary import print_summary
from flows.run.folder import RunRequest, StageRequest
from flows.run.runner import Ending
from flows.tasks import RunnerName
from fuselip_core.config import parse_overrides
from fuselip_core.errors import FuselipError

STOPPED = "stopped; the same command goes on from what is done"


def run_from_command_line(flow: Flow[Any, Any], kind: type[BaseModel], arguments: Sequence[str] | None = None) -> None:
    """Runs `flow` with a request of `kind` made of the command line's options, and ends the process.

    The exit code is 0 if all went well, 1 with one line on stderr if not, 2 for a wrong option.
    """
    options = vars(_parser(flow, kind).parse_args(arguments))
    runner = options.pop("runner", None)
    try:
        request = _read(kind, options)
        # Looked at before Prefect's server starts, which takes a while.
        if isinstance(request, RunRequest | StageRequest):
            request.plan(REPOSITORY)
    except ValidationError as error:
        wrong = error.errors()[0]
        _fail(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}", code=2)
    except FuselipError as error:
        _fail(str(error), code=error.exit_code)
    _say_once(terminal=sys.stderr.isatty())
    state = _run(flow, [request, *([runner] if runner else [])])
    if not state.is_completed():
        _fail(state.message or str(state.name), code=1)
    ending = state.result()
    if isinstance(ending, Ending):
        print_summary(ending, Console())
    else:
        Console().print(state.message, highlight=False, markup=False, soft_wrap=True)


def _run(flow: Flow[Any, Any], arguments: list[Any]) -> State[Any]:
    """The flow's last state; SIGTERM and Ctrl-C end its stage, and then this process with one sentence."""
    # Ending this process must end the stage it waits for: an exception does, the signal's default would not.
    signal.signal(signal.SIGTERM, _raise_exit)
    try:
        state: State[Any] = flow(*arguments, return_state=True)  # type: ignore[assignment]
    except KeyboardInterrupt:
        _fail(STOPPED, code=128 + signal.SIGINT)
    except SystemExit as end:
        if end.code != 128 + signal.SIGTERM:
            raise
        _fail(STOPPED, code=128 + signal.SIGTERM)
    return state


def _parser(flow: Flow[Any, Any], kind: type[BaseModel]) -> argparse.ArgumentParser:
    """An option for each plain field of `kind`; fields of its sections are set by --set."""
    description = (flow.description or "").partition("Args:")[0]
    parser = argparse.ArgumentParser(prog=f"python -m flows.{flow.name}", description=description)
    schema = kind.model_json_schema()["properties"]
    for name, field in schema.items():
        if "$ref" in field or name == "overrides":
            continue
        option = {"dest": name, "default": argparse.SUPPRESS, "help": field.get("description", "").replace("%", "%%")}
        if field.get("type") == "boolean":
            option["action"] = argparse.BooleanOptionalAction
        elif field.get("type") == "array":
            option["action"] = "append"
        else:
            option |= {"choices": field.get("enum"), "metavar": None if "enum" in field else name.upper()}
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    if any("$ref" in field for field in schema.values()):
        parser.add_argument("--set", action="append", metavar="SECTION.FIELD=VALUE", help="correction of a field")
    if "runner" in flow.parameters.properties:
        parser.add_argument("--runner", choices=get_args(RunnerName), default="process", help="where stages run")
    return parser


def _read(kind: type[BaseModel], options: dict[str, Any]) -> BaseModel:
    overrides = options.pop("set", None) or []
    if "overrides" in kind.model_fields:
        return kind.model_validate({**options, "overrides": overrides})
    return kind.model_validate({**options, **parse_overrides(overrides)})


def _say_once(terminal: bool) -> None:
    """Keeps from Prefect's console, not from its server, what is said here: why a flow failed, as its last sentence.

    On a terminal also the lines of a stage, which writes there itself.
    """

    def is_new(record: logging.LogRecord) -> bool:
        said = str(record.msg).startswith(("Finished in state Failed(", "Task run failed with state: Failed("))
        return not said and not (terminal and getattr(record, "shown", False))

    for name in ("", "prefect"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, PrefectConsoleHandler):
                handler.addFilter(is_new)


def _raise_exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _fail(sentence: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"error: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)
