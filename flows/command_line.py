"""A flow on the command line: its options, what it prints, and its exit code."""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from prefect import Flow
from prefect.client.schemas import State
from prefect.logging.handlers import PrefectConsoleHandler
from pydantic import BaseModel, ValidationError
from rich.console import Console

from flows.environment import REPOSITORY
from flows.page.summary import print_summary
from flows.run.estimate import preview
from flows.run.folder import plan
from flows.run.forms import Request, RunRequest
from flows.run.runner import Ending
from flows.tasks import RUNNER, RunnerName
from fuselip_core.config import parse_overrides
from fuselip_core.errors import FuselipError, run_to_exit

STOPPED = "stopped; the same command resumes it"


class Stopped(FuselipError):
    """A signal ended the flow; the exit code is a shell's for that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(STOPPED)
        self.exit_code = 128 + number


class WrongOption(FuselipError):
    """An option's value does not fit its field."""

    exit_code = 2


def run_from_command_line(flow: Flow[Any, Any], kind: type[BaseModel], arguments: Sequence[str] | None = None) -> None:
    """Runs `flow` with a request of `kind` made of the command line's options, and ends the process.

    The exit code is 0 if all went well, 1 with one line on stderr if not, 2 for a wrong option.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=(flow.description or "").partition("Args:")[0])(_command(flow, kind))
    run_to_exit(lambda: app(args=arguments, prog_name=f"python -m flows.{flow.name.replace('-', '_')}"))


def _command(flow: Flow[Any, Any], kind: type[BaseModel]) -> Any:
    """A function for Typer with an option for each field of `kind`, as Prefect's form has them."""

    def command(**given: Any) -> None:
        runner = given.pop("runner", None)
        _run(flow, _request(kind, given), [runner] if runner else [])

    options = [_option(name, field) for name, field in kind.model_fields.items()]
    if "runner" in flow.parameters.properties:
        help_text = "Where stages run: in processes on this machine, or in the project's containers."
        options.append(_parameter("runner", RunnerName, RUNNER, typer.Option("--runner", help=help_text)))
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return command


def _option(name: str, field: Any) -> inspect.Parameter:
    if name == "overrides":
        text = "Any other setting; may be repeated. `fuselip recipes show NAME` lists them."
        return _parameter(name, list[str] | None, None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help=text))
    flag = f"--{name.replace('_', '-')}"
    variants = () if get_origin(field.annotation) is Literal else get_args(field.annotation)
    kinds = [each for each in (variants or (field.annotation,)) if each is not type(None)]
    base = field.annotation if isinstance(field.default, bool | tuple) else kinds[0]
    text = field.description
    if isinstance(field.default, bool):
        return _parameter(name, bool, field.default, typer.Option(f"{flag}/--no-{flag[2:]}", help=text))
    if isinstance(field.default, tuple):
        return _parameter(name, list[str] | None, None, typer.Option(flag, help=text))
    while hasattr(base, "__metadata__"):  # what only the form needs to know
        base = base.__origin__
    return _parameter(name, base | None, None, typer.Option(flag, help=text, show_default=False))


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _request(kind: type[BaseModel], given: dict[str, Any]) -> BaseModel:
    """The request that the options mean; raises FuselipError for the first one that is wrong."""
    given = {name: value for name, value in given.items() if value not in (None, [])}
    if texts := given.pop("overrides", None):
        # One text may hold several, as SET="train.steps=5 train.init=my folder" does.
        texts = [each for text in texts for each in re.split(r"\s+(?=[a-z_]+(?:\.\w+)+=)", text.strip())]
        given["overrides"] = parse_overrides(texts)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        wrong = error.errors()[0]
        option = "--" + ".".join(map(str, wrong["loc"])).replace("_", "-")
        raise WrongOption(f"{option}: {wrong['msg']}, not {wrong['input']!r}") from error


def _run(flow: Flow[Any, Any], request: BaseModel, more: list[Any]) -> None:
    # Checked before Prefect's server starts, which takes a while.
    planned = plan(REPOSITORY, request).run if isinstance(request, Request) else None
    if planned and isinstance(request, RunRequest) and request.dry_run:
        Console().print(preview(planned), highlight=False, markup=False, soft_wrap=True)
        return
    _require_writable(Path(os.environ["PREFECT_HOME"]))
    _quiet(terminal=sys.stderr.isatty())
    state = _state(flow, [request, *more])
    if not state.is_completed():
        raise FuselipError(state.message or str(state.name))
    ending = state.result()
    if isinstance(ending, Ending):
        print_summary(ending, Console())
    else:
        Console().print(state.message, highlight=False, markup=False, soft_wrap=True)


def _require_writable(home: Path) -> None:
    """Raises OSError, which is one sentence, as of a checkout mounted read-only: Prefect would say it in 100 lines."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=home):
        pass


def _state(flow: Flow[Any, Any], arguments: list[Any]) -> State[Any]:
    """The flow's last state; SIGTERM and Ctrl-C end its stage, and then this process with one sentence."""
    # Ending this process must end the stage it waits for: an exception does, the signal's default would not.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return flow(*arguments, return_state=True)  # type: ignore[return-value]
    except KeyboardInterrupt as error:
        raise Stopped(signal.SIGINT) from error
    except SystemExit as end:
        if end.code != 128 + signal.SIGTERM:
            raise
        raise Stopped(signal.SIGTERM) from end


def _quiet(terminal: bool) -> None:
    """Keeps from the console, not from Prefect's server, what this process says itself: errors of flows and tasks.

    On a terminal also the lines of a stage, which writes there itself.
    """

    def is_new(record: logging.LogRecord) -> bool:
        if record.name.endswith(".stage"):
            return not terminal
        # Prefect reports the end of a flow that returns a failed state as INFO.
        least = logging.INFO if record.name.startswith("prefect.flow_runs") else logging.ERROR
        return not (record.name.startswith(("prefect.flow_runs", "prefect.task_runs")) and record.levelno >= least)

    for name in ("", "prefect"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, PrefectConsoleHandler):
                handler.addFilter(is_new)
