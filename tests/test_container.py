"""What the images run, without an engine: words to settings, mounted folders looked at, done stages left alone."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from fuselip_core.config import STAGES, Settings, SettingsError, load_settings
from fuselip_core.container import __main__ as container
from fuselip_core.container import skip_done as chain
from fuselip_core.container.fit_recipe import without_missing_kinds, without_nameless_concepts
from fuselip_core.container.mounts import MountError, require_data, require_writable
from fuselip_core.data.pair import DataError
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.files import write_json
from fuselip_core.lock import sole_process
from fuselip_core.tracking.run import open_run, run_of

NOBODY = 12345


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSELIP_WORKSPACE", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "FUSELIP_WORK", "FUSELIP_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ROCOv2_data", "models", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


def read(words: list[str]) -> container.Asked:
    """What the training image takes `words` for; nothing runs."""
    found: list[container.Asked] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "_run", lambda asked, *_: found.append(asked))
        container._command("train", words)
    return found[0]


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts back what `container.main` sets for its own process, and closes its log files."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    handlers = list(logging.getLogger().handlers)
    yield
    for number, handler in before:
        signal.signal(number, handler)
    for added in set(logging.getLogger().handlers) - set(handlers):
        logging.getLogger().removeHandler(added)


def test_a_size_and_overrides_become_settings(workspace: Path) -> None:
    settings, name, _ = read(["base", "train.steps=7", "--set", "train.seed=3"])
    assert (settings.model.size, settings.train.steps, settings.train.seed) == ("base", 7, 3)
    assert settings.prepare.root == workspace / "ROCOv2_data"
    assert settings.prepare.source == "rocov2"
    assert settings.artifacts == workspace / "models" / ".work" / name
    assert name == f"{settings.register_.name}-base"


def test_recipe_and_its_own_size_are_kept(workspace: Path) -> None:
    settings = read(["--recipe", "vqa-rad"]).settings
    assert (settings.recipe, settings.model.size, settings.prepare.source) == ("vqa-rad", "tiny", "vqa-rad")


def test_too_little_memory_is_said_before_anything_starts(workspace: Path, small_memory: list[str]) -> None:
    """With a limit of 600 MB, as of `docker run -m 600m`, and in the first seconds."""
    (workspace / "ROCOv2_data" / "train_captions.csv").write_text("ID,Caption\n")
    command = [*small_memory, sys.executable, "-m", "fuselip_core.container", "train", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: this container may use 0.6 GB of memory, but size tiny needs at least 1.0; raise --memory, or choose a "
        "smaller size"
    )


def test_a_read_only_container_names_the_option_that_helps(repository: Path, tmp_path: Path) -> None:
    """As with `docker run --read-only` alone: nothing can be written to the folder for temporary files."""
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "TMPDIR": "/proc/read-only"}
    command = ["sh", str(repository / "docker" / "entrypoint.sh"), "true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    wanted = "error: nothing can be written to /proc/read-only; with --read-only add --tmpfs /tmp\n"
    assert done.stderr == wanted
    assert not subprocess.run(command, env={**environment, "TMPDIR": str(tmp_path / "tmp")}).returncode


@pytest.fixture
def small_memory() -> Iterator[list[str]]:
    """Words before a command that give it 600 MB."""
    group = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").is_dir() else Path("/sys/fs/cgroup")
    group /= f"fuselip-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = next(group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists())
        limit.write_text("600000000")
    except (OSError, StopIteration):
        pytest.skip("needs the right to make a control group with a memory limit")
    yield ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    group.rmdir()


@pytest.mark.parametrize(
    ("words", "recipe", "size"),
    [([], "fuselip-rocov2", "small"), (["base"], "fuselip-rocov2", "base"), (["tiny"], "rocov2-tiny", "tiny")],
)
def test_what_is_not_named_adapts_to_rocov2(workspace: Path, words: list[str], recipe: str, size: str) -> None:
    settings, name, _ = read(words)
    assert (settings.recipe, settings.model.size, name) == (recipe, size, f"fuselip-rocov2-{size}")
    published = {"small": "chs20/FuseLIP-S-CC12M-MM", "base": "chs20/FuseLIP-B-CC12M-MM"}
    assert settings.train.init == published.get(size)


def test_the_documented_words_are_understood(
    workspace: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the table in docs/containers.md; what each runs is tried elsewhere in this file."""
    monkeypatch.setattr(container, "_run", lambda *_: None)
    text = (repository / "docs" / "containers.md").read_text()
    rows = text.partition("| Words behind")[2].partition("\n\n")[0].splitlines()[2:]
    documented = [words.split() for row in rows for words in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(documented) >= 9
    for words in documented:
        container._command("train", [*words, "--help"] if words[0] in ("embed", "sync") else words)
    assert "bacor_fuselip_train sync" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["smal"], "did you mean small"),
        (["tiny", "base"], "give one"),
        (["train.stepz=3"], "did you mean steps"),
        (["tiny", "--name", "../../escaped"], "can't name a run"),
        (["tiny", "artifacts=/elsewhere"], "artifacts cannot be set"),
        (["tiny", "--gpus", "all"], "No such option: --gpus.*bacor_fuselip_train --help"),
        (["--recipe", "nonsense"], "nonsense"),
    ],
)
def test_wrong_words_get_a_hint(workspace: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        read(words)


def test_data_that_is_missing_empty_or_unfinished_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for state, sentence in (("missing", "there is no"), ("empty", "is empty")):
        if state == "empty":
            folder.mkdir()
        with pytest.raises(MountError, match=sentence):
            require_data(folder, "-v here:there")
    (folder / "train-00000-of-00002.parquet").touch()
    with pytest.raises(MountError, match="train-00001-of-00002 is missing"):
        require_data(folder, "-v here:there")
    (folder / "train-00001-of-00002.parquet").touch()
    require_data(folder, "-v here:there")
    (folder / ".test-00000-of-00001.parquet.partial").touch()
    with pytest.raises(MountError, match="not downloaded completely"):
        require_data(folder, "-v here:there")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir(mode=0o755)
    before = os.geteuid()
    os.seteuid(NOBODY)
    try:
        with pytest.raises(MountError, match=f"user {NOBODY}:[0-9]+ may not write"):
            require_writable(tmp_path / "models", "-v here:there", in_container=False)
    finally:
        os.seteuid(before)


def test_what_is_not_mounted_would_be_lost(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="nothing is mounted at /opt"):
        require_writable(Path("/opt"), "-v here:/opt", in_container=True)


def test_a_folder_mounted_to_be_read_only_is_one_sentence(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(MountError, match="mounted read-only; remove :ro"):
        require_writable(small_disk, "-v here:there", in_container=False)


def test_an_empty_address_of_mlflow_is_none(workspace: Path, signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setattr(container, "run_stages", lambda *_, **__: None)
    (workspace / "ROCOv2_data" / "valid_captions.csv").write_text("ID,Caption\n")
    assert container.main(["train", "tiny"]) == 0
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{workspace}/logs/mlflow/mlflow.db"


def test_only_one_run_holds_a_folder(
    workspace: Path, signals: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(container, "run_stages", lambda *_, **__: None)
    (workspace / "ROCOv2_data" / "valid_captions.csv").write_text("ID,Caption\n")
    assert container.main(["train", "tiny"]) == 0
    lock = workspace / "models" / ".work" / "fuselip-rocov2-tiny" / ".lock"
    with sole_process(lock, FuselipError("held already")):
        assert container.main(["train", "tiny"]) == 1
    assert "another container is using" in capsys.readouterr().err
    assert container.main(["train", "tiny"]) == 0


@pytest.fixture
def called(workspace: Path, signals: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were run: stand-ins that only leave what the next ones, and a reader, look for."""
    names: list[str] = []
    pairs = {"caption": 4, "sentence": 4, "concepts": 4, "vqa": 4, "edit": 4}
    counts = {split: {"images": 4, "pairs": pairs} for split in ("train", "valid", "test")}

    def stand_in(stage: str, settings: Settings) -> dict[str, Any]:
        names.append(stage)
        if stage == "register":
            write_json(settings.artifacts / "registered.json", {})
            (settings.artifacts / "cards").mkdir(exist_ok=True)
            (settings.artifacts / "cards" / "README.md").write_text("card")
            return {"name": "fuselip-rocov2-tiny", "version": 1, "tracking_uri": "sqlite:///here"}
        folder = settings.artifacts / chain.OUTPUT[stage]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.html").write_text(f"{stage} {len(names)}")
        if stage == "prepare":
            write_json(folder / "manifest.json", {"counts": counts, "shards": [], "data_version": "x"})
        if stage == "train":
            (settings.artifacts / "history.jsonl").touch()
        if stage == "evaluate":
            write_json(settings.artifacts / "metrics.json", {"calls": len(names)})
        return {"calls": len(names)}

    for stage in STAGES:
        monkeypatch.setattr(f"fuselip_core.stages.{stage}", functools.partial(stand_in, stage))
    monkeypatch.setattr(container, "check_run", lambda *_: None)  # see test_preflight.py
    (workspace / "ROCOv2_data" / "valid_captions.csv").write_text("ID,Caption\n")
    return names


def test_a_stage_runs_again_only_if_what_it_reads_has_changed(
    workspace: Path, called: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fuselip")
    words = ["train", "tokenize", "tiny", "--recipe", "rocov2-tiny", "codebook.steps=1"]
    for more, wanted in (
        ([], ["prepare", "codebook", "tokenize"]),
        ([], []),
        (["tokenize.views=2"], ["tokenize"]),
        (["codebook.seed=1"], ["codebook", "tokenize"]),
    ):
        called.clear()
        assert container.main([*words, *more]) == 0, caplog.text
        assert called == wanted
    assert "no GPU" in caplog.text or "training on" in caplog.text
    (workspace / "ROCOv2_data" / "valid_captions.csv").write_text("ID,Caption\nA,B\n")
    called.clear()
    assert container.main(words) == 0
    assert called == ["prepare", "codebook", "tokenize"]


def test_evaluate_measures_once_more_and_does_not_make_train_do_so(called: list[str]) -> None:
    assert container.main(["train", "tiny"]) == 0
    assert called == list(STAGES)
    for words, wanted in (
        (["evaluate", "tiny"], ["evaluate"]),
        (["evaluate", "tiny"], ["evaluate"]),
        (["tiny"], ["register"]),
        (["evaluate", "tiny", "evaluate.seed=1"], ["evaluate"]),
        (["tiny"], ["evaluate", "register"]),  # what is registered is measured as its settings say
        (["tiny"], ["register"]),
    ):
        called.clear()
        assert container.main(["train", *words]) == 0
        assert called == wanted


def test_model_and_report_are_delivered_where_registering_fails(
    workspace: Path, called: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(settings: Settings) -> dict[str, Any]:
        raise FuselipError("the registry did not take the model")

    caplog.set_level(logging.INFO, "fuselip")
    with monkeypatch.context() as patch:
        patch.setattr("fuselip_core.stages.register", refuse)
        assert container.main(["train", "tiny"]) == 1
    logs = workspace / "logs" / "fuselip-rocov2-tiny"
    assert (workspace / "models" / "fuselip-rocov2-tiny" / "index.html").read_text() == "train 4"
    assert (logs / "report" / "index.html").read_text() == "evaluate 5"
    assert (logs / "metrics.json").is_file() and (logs / "history.jsonl").is_file()
    assert f"model: {workspace}/models/fuselip-rocov2-tiny" in caplog.text
    assert f"report: {logs}/report/index.html" in caplog.text
    called.clear()
    assert container.main(["train", "tiny"]) == 0
    assert called == ["register"], "the same command only registers"
    assert (logs / "registered.json").is_file()
    assert (workspace / "models" / "fuselip-rocov2-tiny" / "README.md").read_text() == "card"


def test_the_model_is_delivered_where_logs_are_full(
    small_disk: Path, workspace: Path, called: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "logs").rmdir()
    (workspace / "logs").symlink_to(small_disk)
    (small_disk / "fuselip-rocov2-tiny").mkdir()
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(1 << 16))
    assert container.main(["train", "tiny"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no space is left on the disk at ")
    assert (workspace / "models" / "fuselip-rocov2-tiny" / "index.html").read_text() == "train 4"


def test_sync_is_a_word_of_the_image(
    workspace: Path, signals: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace / "models" / ".work" / "fuselip-rocov2-tiny"
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with open_run(load_settings(recipe="sample", artifacts=run), "train") as log:
            log.metrics({"train/loss": 1.0}, 1)
        assert container.main(["train", "sync"]) == 1
    assert "not all events of fuselip-rocov2-tiny were sent; check MLFLOW_TRACKING_URI" in capsys.readouterr().err
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    assert container.main(["train", "sync"]) == 0
    known = run_of(run)
    assert known["mlflow_uri"] == f"sqlite:///{workspace}/logs/mlflow/mlflow.db"
    client = MlflowClient(known["mlflow_uri"])
    assert client.get_run(known["mlflow_run_id"]).data.metrics == {"train/loss": 1.0}


def test_own_shards_are_used_as_they_are(workspace: Path) -> None:
    settings = read(["tiny"]).settings
    settings.artifacts.mkdir(parents=True)
    assert not chain.take_prepared(settings)
    manifest, shard = settings.prepare.root / "manifest.json", "images-train-00000-of-00001.parquet"
    write_json(manifest, {"data_version": "1", "counts": {}, "shards": [{"path": shard}]})
    with pytest.raises(DataError, match=f"lacks {shard}, which its manifest lists"):
        chain.take_prepared(settings)
    (settings.prepare.root / shard).touch()
    assert chain.take_prepared(settings) and chain.take_prepared(settings)
    assert (settings.artifacts / "prepared" / "manifest.json").read_text() == manifest.read_text()


def test_a_foreign_manifest_makes_no_prepared_data(
    workspace: Path, signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "ROCOv2_data" / "manifest.json").write_text('{"name": "a web app"}')
    (workspace / "ROCOv2_data" / "images-train-0.parquet").touch()
    assert container.main(["train", "tiny"]) == 1
    assert "has no known layout of ROCOv2" in capsys.readouterr().err


def test_what_the_data_set_lacks_is_taken_back_unless_it_was_asked_for(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fuselip")
    settings = read(["tiny"]).settings
    assert "concepts" in settings.prepare.extra_pairs and settings.train.mixture["concepts"] > 0
    words = ["tiny", "train.steps=3", "--set", "prepare.extra_pairs=[concepts]"]
    asked = read(words).fields
    assert asked == {"train.steps", "prepare.extra_pairs"}
    assert without_nameless_concepts(settings, asked) == settings
    without = without_nameless_concepts(settings, ())
    assert list(without.prepare.extra_pairs) == ["sentences"] and "no cui_mapping.csv" in caplog.text
    (settings.prepare.root / "cui_mapping.csv").touch()
    assert without_nameless_concepts(settings, ()) == settings
    counts = {"train": {"images": 2, "pairs": {"caption": 2, "sentence": 1}}}
    write_json(settings.artifacts / "prepared" / "manifest.json", {"data_version": "1", "counts": counts, "shards": []})
    assert set(without_missing_kinds(settings, ()).train.mixture) == {"caption", "sentence"}
    assert "no pairs of kind concepts" in caplog.text
    assert without_missing_kinds(settings, {"train.mixture"}) == settings


def test_evaluate_without_a_model_says_what_to_run_first(
    workspace: Path, signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert container.main(["train", "evaluate", "tiny"]) == 1
    assert "no trained model" in capsys.readouterr().err


def test_a_stage_is_stopped_with_the_documented_code(repository: Path) -> None:
    code = (
        "import sys, time; from fuselip_core.container import __main__ as container\n"
        "container._command = lambda *_: (print('up', flush=True), time.sleep(60))\n"
        "sys.exit(container.main(['train']))"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        child = subprocess.Popen(
            [sys.executable, "-c", code], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert child.stdout and child.stdout.readline() == "up\n"
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
        assert child.returncode == Interrupted.exit_code
        assert said.startswith("error: stopped; ") and said.count("\n") == 1


def test_keys_change_with_what_a_stage_reads() -> None:
    base, other = (load_settings(recipe="sample", overrides=[f"train.steps={steps}"]) for steps in (5, 6))
    assert chain._key(base, "tokenize", "") == chain._key(other, "tokenize", "")
    assert chain._key(base, "train", "") != chain._key(other, "train", "")
