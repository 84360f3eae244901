"""What flows add to stages: run folders, locks, child processes, states, and Prefect's own bookkeeping."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_stack import Served
from repository_copy import copy_of, dvc

from flows import command_line
from flows import tasks as steps
from flows.page.summary import next_commands, registered_line
from flows.pipeline import pipeline
from flows.run.child import stream
from flows.run.dvc_stage import UNCHANGED
from flows.run.folder import plan
from flows.run.forms import RunRequest
from flows.run.lock import dvc_lock
from flows.run.runner import Ending, LastLines, ProcessRunner, stage_environment
from flows.run.sample_data import ensure_sample
from fuselip_core.config import STAGES, SettingsError, load_settings
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.comparisons import comparison_rows


@pytest.fixture(scope="module")
def prefect_server(prefect_served: Served) -> Iterator[None]:
    """The server that all tests share, for flows of this process."""
    with temporary_settings({PREFECT_API_URL: prefect_served.api}):
        yield


@pytest.fixture
def copy(template: Path, tmp_path: Path) -> Path:
    return copy_of(template, tmp_path / "repository")


@pytest.fixture
def said() -> list[str]:
    return []


# Run folders


@pytest.fixture
def bare(tmp_path: Path, repository: Path) -> Path:
    """A repository with nothing but the two files that a run folder is made from."""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((repository / name).read_text())
    return tmp_path


@pytest.mark.parametrize("request_", [RunRequest(), RunRequest(source="phantom"), RunRequest(recipe="sample")])
def test_plain_request_is_the_root_pipeline(bare: Path, request_: RunRequest) -> None:
    run = plan(bare, request_).write()
    assert (run.folder, run.dvc_file, run.artifacts) == (bare, "dvc.yaml", bare / "artifacts")
    assert not (bare / "runs").exists()


def test_other_source_gets_a_folder_of_its_own(bare: Path) -> None:
    (bare / "images").mkdir()
    request = RunRequest(source="rocov2", root=bare / "images", overrides={"train.steps": 7})
    run = plan(bare, request).write()
    assert run.dvc_file == "runs/rocov2/dvc.yaml"
    assert run.settings.train.steps == 7 and run.settings.recipe == "rocov2-tiny"
    written = yaml.safe_load((run.folder / "params.yaml").read_text())
    assert written["settings"] == "runs/rocov2/params.yaml" and written["repository"] == "../.."
    assert written["prepare"]["root"] == str(bare / "images") and written["tokenize"] == {}
    assert load_settings(run.folder / "params.yaml") == run.settings
    assert (run.folder / "dvc.yaml").read_text() == (bare / "dvc.yaml").read_text()


def test_relative_root_is_meant_from_the_current_folder(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "deep" / "images").mkdir(parents=True)
    monkeypatch.chdir(bare / "deep")
    run = plan(bare, RunRequest(source="rocov2", root=Path("images"))).write()
    assert str(run.settings.prepare.root) == "deep/images"


def test_variant_of_the_root_keeps_its_corrections(bare: Path) -> None:
    params = yaml.safe_load((bare / "params.yaml").read_text())
    (bare / "params.yaml").write_text(yaml.safe_dump({**params, "codebook": {"steps": 3}}))
    run = plan(bare, RunRequest(overrides={"train.steps": 7}, name="mine")).write()
    assert (run.name, run.settings.codebook.steps, run.settings.train.steps) == ("mine", 3, 7)
    again = plan(bare, RunRequest(overrides={"train.batch_size": 5}, name="mine")).write()
    assert again.settings.train.steps != 7, "a request is whole: nothing is left of an earlier one"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (RunRequest(overrides={"train.stepz": 1}), "did you mean steps"),
        (RunRequest(source="rocov2", root=Path("/nowhere")), "no data set folder /nowhere"),
        (RunRequest(source="vqa-rad"), "make demo SOURCE=vqa-rad ROOT="),
        (RunRequest(recipe="nope"), "unknown recipe 'nope'"),
        (RunRequest(name="../x"), "can't name a run"),
    ],
)
def test_wrong_request_is_one_sentence(bare: Path, request_: RunRequest, words: str) -> None:
    with pytest.raises(FuselipError) as caught:
        plan(bare, request_).write()
    assert words in str(caught.value)


def test_wrong_request_leaves_no_folder(bare: Path) -> None:
    with pytest.raises(SettingsError):
        plan(bare, RunRequest(overrides={"train.steps": 0})).write()
    assert not (bare / "runs").exists()


# Child processes


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_lines_of_both_streams_arrive_plain(tmp_path: Path, said: list[str]) -> None:
    code = r"import sys; print('\x1b[1mone\x1b[0m'); print(' 1%\r50%\r99%'); sys.stderr.write('last'); sys.exit(7)"
    assert stream(python(code), tmp_path, os.environ, said.append) == 7
    assert said == ["one", "99%", "last"]


def test_error_line_is_the_message_and_else_the_last(said: list[str]) -> None:
    lines = LastLines(said.append)
    for line in ("working", "error: no luck", "bye"):
        lines(line)
    assert lines.message(1) == "no luck" and said[-1] == "bye"
    other = LastLines(said.append)
    other("only this")
    assert other.message(139) == "ended with code 139; its last lines were: only this"


def test_child_is_asked_to_stop_and_may_save_its_state(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, time\n"
        "def stop(*_):\n    print('saving ' * 20000); pathlib.Path('saved').touch(); raise SystemExit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('ready')\ntime.sleep(60)"
    )

    def cancel(line: str) -> None:
        if line == "ready":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(python(code), tmp_path, os.environ, cancel)
    assert (tmp_path / "saved").exists()


# The lock around DVC


def test_second_run_waits_and_says_for_whom(tmp_path: Path, said: list[str]) -> None:
    done = []

    def second() -> None:
        with dvc_lock(tmp_path, "second", said.append):
            done.append("second")

    with dvc_lock(tmp_path, "train of process 7", said.append):
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        done.append("first")
    thread.join(timeout=30)
    assert done == ["first", "second"]
    assert said == ["waiting for another run that is at work here: train of process 7"]


def test_a_flow_of_many_stages_lets_a_waiting_one_in(tmp_path: Path, said: list[str]) -> None:
    order: list[str] = []

    def wait_once() -> None:
        with dvc_lock(tmp_path, "second", said.append):
            order.append("second")

    waiting = threading.Thread(target=wait_once)
    for stage in range(4):
        with dvc_lock(tmp_path, "first", print):
            order.append(f"first {stage}")
            if not stage:
                waiting.start()
                while not said:
                    time.sleep(0.01)
    waiting.join()
    assert order == ["first 0", "second", "first 1", "first 2", "first 3"]


def test_lock_lives_as_long_as_an_orphaned_child(tmp_path: Path) -> None:
    with dvc_lock(tmp_path, "first", print) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    try:
        with (tmp_path / ".dvc" / "tmp" / "flow.lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        child.kill()
        child.wait()


# One stage through DVC


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().split() if path.exists() else []


def test_stage_runs_once_and_again_after_its_parameter_changes(copy: Path, said: list[str]) -> None:
    run = plan(copy, RunRequest()).write()
    runner = ProcessRunner()
    assert runner.run("prepare", run, said.append).status == "done"
    assert runner.run("prepare", run, said.append).status == "unchanged"
    assert runner.run("prepare", run, said.append, force=True).status == "done"
    assert calls(copy) == ["prepare", "prepare"]
    params = yaml.safe_load((copy / "params.yaml").read_text())
    (copy / "params.yaml").write_text(yaml.safe_dump({**params, "prepare": {"root": "data", "limit": 5}}))
    assert runner.run("prepare", plan(copy, RunRequest()).write(), said.append).status == "done"


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGKILL, "failed", "by SIGKILL; most likely this machine ran out of memory"),
        (signal.SIGTERM, "interrupted", "by SIGTERM; the same command resumes it"),
    ],
)
@pytest.mark.parametrize("command", ['exec /bin/sh "$@"', '/bin/sh "$@"; exit $?'], ids=["replaced", "stays"])
def test_a_stage_that_a_signal_ends_says_which(
    copy: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: str,
    words: str,
    command: str,
) -> None:
    """The exit code comes all the way up through DVC, from a shell that the stage replaces or that waits for it."""
    shell = copy / "shell"
    shell.write_text(f"#!/bin/sh\n{command}\n")
    shell.chmod(0o755)
    monkeypatch.setenv("SHELL", str(shell))
    stages = copy / "fuselip_core" / "stages.py"
    ends = f"os.kill(os.getpid(), {int(number)})"
    stages.write_text(stages.read_text().replace('note("calls", stage)', ends))
    outcome = ProcessRunner().run("prepare", plan(copy, RunRequest()).write(), said.append)
    assert outcome.status == status and f"the stage was ended from outside {words}" in outcome.message


@pytest.mark.parametrize(("how", "status"), [("fail", "failed"), ("interrupt", "interrupted")])
def test_failing_stage_tells_its_own_sentence(copy: Path, said: list[str], how: str, status: str) -> None:
    (copy / "order").write_text(f"prepare {how}")
    outcome = ProcessRunner().run("prepare", plan(copy, RunRequest()).write(), said.append)
    assert (outcome.status, outcome.message) == (status, "no luck in prepare; try again")
    assert not [line for line in said if "Traceback" in line]
    assert not (copy / "artifacts" / "prepared").exists()


def test_what_dvc_itself_refuses_is_one_line(copy: Path, said: list[str]) -> None:
    outcome = ProcessRunner().run("codebook", plan(copy, RunRequest()).write(), said.append)
    assert outcome.status == "failed"
    assert outcome.message.startswith("DVC: ") and "artifacts/prepared" in outcome.message


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"stages: ["])
def test_a_damaged_lock_is_one_line_with_its_remedy(copy: Path, said: list[str], content: bytes) -> None:
    (copy / "dvc.lock").write_bytes(content)
    outcome = ProcessRunner().run("prepare", plan(copy, RunRequest()).write(), said.append)
    assert outcome.status == "failed"
    assert outcome.message.startswith("DVC: ") and "restore dvc.lock with git, or delete it" in outcome.message
    assert not [line for line in said if "Traceback" in line]
    with pytest.raises(FuselipError, match=r"restore dvc\.lock with git, or delete it"):
        plan(copy, RunRequest(name="variant")).write()


@pytest.mark.parametrize("content", [b"outs:\n- md5: a1\n", b"\xff\xfe", b""])
def test_a_damaged_data_dvc_is_one_sentence(copy: Path, said: list[str], content: bytes) -> None:
    (copy / "data.dvc").write_bytes(content)
    with pytest.raises(FuselipError, match=r"restore data\.dvc with git"):
        ensure_sample(copy, said.append)


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("dvc.yaml", b"\xff\xfe", "restore dvc.yaml with git"),
        ("dvc.yaml", b"stages: [", "restore dvc.yaml with git"),
        ("params.yaml", b"recipe: sample\n", "restore params.yaml with git"),
    ],
)
def test_a_damaged_pipeline_is_one_line(copy: Path, said: list[str], name: str, content: bytes, remedy: str) -> None:
    (copy / name).write_bytes(content)
    outcome = ProcessRunner().run("prepare", plan(copy, RunRequest()).write(), said.append)
    assert outcome.status == "failed" and outcome.message.startswith("DVC: ") and outcome.message.endswith(remedy)
    assert not [line for line in said if "Traceback" in line]


def test_a_damaged_file_of_a_run_is_written_anew(bare: Path) -> None:
    run = plan(bare, RunRequest(name="mine")).write()
    whole = (run.folder / "params.yaml").read_bytes()
    (run.folder / "params.yaml").write_bytes(b"\xff\xfe")
    plan(bare, RunRequest(name="mine")).write()
    assert (run.folder / "params.yaml").read_bytes() == whole


def test_child_is_told_the_flow_run_and_finds_this_code(tmp_path: Path) -> None:
    environment = stage_environment(tmp_path, "flow-7")
    assert environment["FUSELIP_FLOW_RUN"] == "flow-7"
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert UNCHANGED not in (0, 1, 2, 75)


# The sample's data


def test_changed_data_is_refused_and_named(copy: Path, said: list[str]) -> None:
    assert ensure_sample(copy, said.append) is False
    (copy / "data" / "file.txt").write_text("other")
    with pytest.raises(FuselipError, match=r"data/ differs from data\.dvc"):
        ensure_sample(copy, said.append)


def test_data_drawn_here_is_put_into_the_cache(copy: Path, said: list[str]) -> None:
    subprocess.run(["rm", "-rf", str(copy / ".dvc" / "cache")], check=True)
    ensure_sample(copy, said.append)
    assert "up to date" in dvc(copy, "status", "data.dvc")


# Whole flows under Prefect


Run = Callable[..., Any]
# Whichever test comes first waits for the start of the server.
pytestmark = pytest.mark.timeout(1500)


@contextlib.contextmanager
def flow_on(folder: Path) -> Iterator[Run]:
    """The pipeline flow, working on `folder`; returns its final state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "REPOSITORY", folder)
        patch.setattr(steps, "_lost_from_registry", lambda run: False)
        yield lambda **request: pipeline(RunRequest(**request), return_state=True)


@pytest.fixture(scope="module")
def finished(template: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    """A copy in which the flow has run once."""
    folder = copy_of(template, tmp_path_factory.mktemp("finished") / "repository")
    with flow_on(folder) as run:
        state = run()
    assert state.is_completed(), state.message
    assert statuses(state.result()) == ["done"] * 6
    assert calls(folder) == list(STAGES)
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Iterator[tuple[Path, Run]]:
    """A copy of the finished one, and the flow on it."""
    folder = copy_of(finished, tmp_path / "repository")
    (folder / "calls").unlink()
    with flow_on(folder) as run:
        yield folder, run


def statuses(ending: Ending) -> list[str]:
    return [outcome.status for outcome in ending.outcomes]


def test_second_flow_skips_what_is_done(again: tuple[Path, Run]) -> None:
    folder, run = again
    assert statuses(run().result()) == ["unchanged"] * 6
    assert calls(folder) == []


def test_variant_starts_from_the_root_and_runs_what_is_behind_its_change(again: tuple[Path, Run]) -> None:
    folder, run = again
    state = run(overrides={"train.steps": 7})
    assert statuses(state.result()) == ["unchanged", "unchanged", "unchanged", "done", "done", "done"]
    assert (folder / "runs" / "phantom" / "artifacts" / "model" / "made").read_text() == "train 7"
    assert (folder / "artifacts" / "model" / "made").read_text() != "train 7"
    assert "up to date" in dvc(folder, "status", "dvc.yaml", "runs/phantom/dvc.yaml")


def test_failing_stage_fails_the_flow_with_its_sentence_and_goes_on_later(again: tuple[Path, Run]) -> None:
    folder, run = again
    (folder / "artifacts" / "model" / "made").write_text("damaged")
    (folder / "order").write_text("train fail")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, "train": {"steps": 7}}))
    state = run()
    assert state.is_failed()
    assert state.message == "train: no luck in train; try again"
    assert calls(folder) == ["train"]
    (folder / "order").unlink()
    assert statuses(run().result()) == ["unchanged", "unchanged", "unchanged", "done", "done", "done"]


def test_interrupted_stage_is_tried_again_and_a_failing_one_is_not(
    again: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = again
    monkeypatch.setattr(steps, "stage_task", steps.stage_task.with_options(retry_delay_seconds=0))
    monkeypatch.setattr(steps, "_lost_from_registry", lambda run: True)
    for how, times in (("interrupt", 1 + len(steps.RETRY_AFTER)), ("fail", 1)):
        (folder / "calls").unlink(missing_ok=True)
        (folder / "order").write_text(f"register {how}")
        state = run()
        assert state.is_failed() and state.message == "register: no luck in register; try again"
        assert calls(folder) == ["register"] * times


def test_wrong_request_fails_the_flow_before_anything_runs(again: tuple[Path, Run]) -> None:
    folder, run = again
    state = run(overrides={"train.steps": 0})
    assert state.is_failed() and "train.steps" in state.message
    assert calls(folder) == []


def test_lost_registration_is_made_again(again: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run = again
    monkeypatch.setattr(steps, "_lost_from_registry", lambda run: True)
    assert statuses(run().result()) == ["unchanged"] * 5 + ["done"]
    assert calls(folder) == ["register"]


def test_flow_leaves_artifacts_in_prefect(finished: Path) -> None:
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={}).json()
    kinds = {each["key"]: each["type"] for each in found}
    assert kinds["metrics"] == "table" and kinds["results"] == "markdown"


# The summary


def test_rows_compare_with_what_was_measured() -> None:
    rows = comparison_rows(
        {
            "retrieval/image_to_text/recall_at_1": 0.4,
            "retrieval/image_to_text/chance_at_1": 0.01,
            "answers/question_only/accuracy": 0.2,
        }
    )
    assert [(row["value"], row["control"], row["value of control"]) for row in rows] == [
        ("0.400", "chance", "0.010"),
        ("", "question alone", "0.200"),
    ]


def test_model_line_says_why_the_alias_stayed() -> None:
    gates = [{"metric": "recall", "at_least": 0.3, "value": 0.1, "passed": False}]
    registered = {"name": "m", "version": 2, "alias": None, "gates": gates}
    assert registered_line(registered) == "m version 2, without the alias: recall 0.1 < 0.3"
    assert registered_line({**registered, "alias": "champion", "gates": []}).startswith("m version 2, alias champion")
    assert registered_line({}) == ""


def test_next_commands_name_the_model(bare: Path) -> None:
    commands = next_commands(plan(bare, RunRequest()).run, {"name": "m", "alias": "champion"})
    assert commands[0].startswith("make serve-ui ")
    assert commands[1].startswith("make serve-model MODEL=models:/m@champion ")
    assert commands[2].startswith("make demo SET=")
    assert commands[3].startswith(".venv/bin/fuselip index build ") and "--model models:/m@champion " in commands[3]
    assert commands[4].startswith(".venv/bin/fuselip app ")


def test_the_next_command_repeats_what_the_run_corrects(bare: Path) -> None:
    asked = {"codebook.steps": 3, "train.mixture": {"caption": 1.0}, "train.steps": 6, "train.init": "my o'brien's"}
    run = plan(bare, RunRequest(name="short", overrides=asked)).write()
    words = shlex.split(next_commands(run, {"name": "m", "alias": None})[2].partition("    #")[0])
    assert words[:3] == ["make", "demo", "NAME=short"]
    again = request_of(["--name", "short", "--set", words[3].removeprefix("SET=")])
    longer = run.settings.train.model_copy(update={"steps": 12})
    assert plan(bare, again).run.settings == run.settings.model_copy(update={"train": longer})


# The command line


def request_of(arguments: list[str]) -> RunRequest:
    """The request that the options of ``python -m flows.pipeline`` mean."""
    found: list[RunRequest] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(command_line, "_run", lambda flow, request, more: found.append(request))
        command_line.run_from_command_line(pipeline, RunRequest, arguments)
    assert ended.value.code == 0
    return found[0]


def test_options_arrive_whole() -> None:
    words = ["--root", "my o'brien", "--set", "train.init=röntgen $1 train.steps=5", "--set", "prepare.limit=2"]
    request = request_of(words)
    assert request.root == Path("my o'brien")
    assert request.overrides == {"train": {"init": "röntgen $1", "steps": 5}, "prepare": {"limit": 2}}


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        (["NAME=röntgen 1"], "error: 'röntgen 1' can't name a run; use the letters a-z, digits, dots, dashes"),
        (["SOURCE=rocov2", 'ROOT=my o\'brien "x" $(y)'], 'my o\'brien "x" $(y); name the folder of your rocov2 files'),
        (["SET=train.stepz=1"], "train.stepz: there is no such field; did you mean steps?"),
    ],
)
def test_make_hands_names_and_paths_over_whole(repository: Path, variables: list[str], wanted: str) -> None:
    """The recipe's line in a shell, with this process's environment in place of one that make would set up."""
    makefile = (repository / "Makefile").read_text().replace("demo: setup", "demo:")
    command = ["make", "-f", "-", f"BIN={Path(sys.executable).parent}", "demo", *variables]
    done = subprocess.run(command, cwd=repository, input=makefile, capture_output=True, text=True)
    assert done.returncode and wanted in done.stderr and "Traceback" not in done.stderr


def test_an_environment_that_moved_is_made_anew(repository: Path, tmp_path: Path) -> None:
    """Its programs and its link to the code name the place for which it was made."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((repository / name).read_bytes())
    (tmp_path / ".ci").mkdir()
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\nif [ "$1" = venv ]; then mkdir -p .venv/bin; ln -sf /bin/true .venv/bin/python; fi\n')
    (tmp_path / ".ci" / "find-uv").write_text(f"#!/bin/sh\necho {shlex.quote(str(uv))}\n")
    for path in (uv, tmp_path / ".ci" / "find-uv"):
        path.chmod(0o755)

    def setup(folder: Path) -> str:
        return subprocess.run(["make", "setup"], cwd=folder, capture_output=True, text=True, check=True).stdout

    assert "setting up" in setup(tmp_path)
    (tmp_path / ".venv" / "old").touch()
    assert "setting up" not in setup(tmp_path) and (tmp_path / ".venv" / "old").exists()
    moved = copy_of(tmp_path, tmp_path.with_name("moved, o'brien (röntgen)"))
    assert "removing .venv" in setup(moved) and not (moved / ".venv" / "old").exists()
    assert "setting up" not in setup(moved)
