"""The images, built and run for real. CI does it: the training image alone is 7 GB."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from engine import BASE, CLOSED, DOCKER, Mounted, ask, build, engine, image_of, labels_of, run, services, serving
from repository_copy import copy_repository

from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.lock import sole_process

USER = 12345
SHORT = (
    "prepare.limit=64",
    "codebook.steps=2",
    "codebook.batch_size=8",
    "train.batch_size=16",
    "train.validate_every=1000",
    "train.checkpoint_every=1000",
)
# The first build of the training image brings 3 GB.
pytestmark = pytest.mark.timeout(2400)
DOCKERFILES = ("Dockerfile.download", "Dockerfile.train", "docker/Dockerfile.server")


class Training(NamedTuple):
    """A container at work."""

    name: str
    child: subprocess.Popen[bytes]
    log: Path

    def end(self, *words: str) -> tuple[int, str]:
        """Exit code and stderr after ``docker <words> <name>``."""
        subprocess.run([DOCKER, *words, self.name], capture_output=True)
        return self.child.wait(timeout=100), self.log.read_text()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_suit_both_builders_and_hide_nothing(repository: Path, name: str) -> None:
    text = (repository / name).read_text()
    assert text.splitlines()[0].startswith("# ") and "syntax=" not in text
    for word in ("--mount", "<<", "git clone", "|| true", "http", "TOKEN", "PASSWORD"):
        assert word not in text, word
    assert "--require-hashes" in text and "HEALTHCHECK" in text
    assert text.startswith("#") and f"FROM {BASE}\n" in text


@pytest.mark.parametrize("name", ["download", "train", "server", "search"])
def test_locks_of_the_images_name_the_versions_of_the_whole(repository: Path, name: str) -> None:
    def pins(path: str) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", (repository / path).read_text(), flags=re.MULTILINE))

    part, whole = pins(f"requirements-{name}.lock"), pins("requirements.lock")
    assert {key: version for key, version in part.items() if key in whole and whole[key] != version} == {}
    assert ("torch" in part) == (name in ("train", "search"))


def test_the_context_holds_no_more_than_an_image_needs(repository: Path) -> None:
    rules = (repository / ".dockerignore").read_text().split("\n")
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules
    assert kept <= {"pyproject.toml", "LICENSE", "README.md", "fuselip_core", "flows", "docker/entrypoint.sh"} | {
        f"requirements-{name}.lock" for name in ("download", "train", "server", "search")
    }


@pytest.mark.long
@pytest.mark.parametrize("buildkit", [True, False])
def test_the_download_image_is_small_and_says_what_is_wrong(buildkit: bool, tmp_path: Path) -> None:
    client = engine()
    tag = "latest" if buildkit else "legacy"
    build("download", tag, buildkit)
    image = f"bacor_fuselip_download:{tag}"
    above = client.images.get(image).attrs["Size"] - client.images.get(BASE).attrs["Size"]
    assert above < 450e6
    assert labels_of(image)["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert client.images.get(image).attrs["Config"]["User"] == "1000:1000"
    done = run(image, "--help", options=CLOSED)
    assert done.returncode == 0 and "bacor_fuselip_download" in done.stdout
    cache = ("-v", f"{tmp_path}:/.cache")
    for options in (("--read-only",), ("--read-only", *cache)):
        done = run(image, "--help", options=options)
        assert done.returncode == 1 and "with --read-only add --tmpfs /tmp" in done.stderr
    done = run(image)
    assert done.returncode == 1 and "nothing is mounted at /app/fuselip/ROCOv2_data" in done.stderr
    (tmp_path / "ROCOv2_data").mkdir()
    mount = ("-v", f"{tmp_path / 'ROCOv2_data'}:/app/fuselip/ROCOv2_data")
    done = run(image, options=mount)
    assert done.returncode == 1 and f"user {USER}:{USER} may not write" in done.stderr
    imports = run(image, "-c", "import torch", options=("--entrypoint", "python"))
    assert "No module named 'torch'" in imports.stderr


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Mounted:
    if os.getuid() != 0:
        pytest.skip("only root can make folders for another user")
    image_of("train")
    return Mounted(tmp_path_factory.mktemp("host"), (shared / "data" / "medpix-rocov2").resolve())


@pytest.mark.long
def test_the_training_image_refuses_in_one_sentence(mounted: Mounted) -> None:
    for words, options, code, sentence in (
        (["smal"], CLOSED, 2, "did you mean small"),
        (["tiny"], CLOSED, 1, "nothing is mounted at /workspace/models"),
        (["tiny"], mounted.options[2:], 1, "/workspace/ROCOv2_data is empty"),
        (["evaluate", "tiny"], mounted.options, 1, "no trained model"),
    ):
        done = run("bacor_fuselip_train", *words, options=options)
        assert done.returncode == code and sentence in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


@contextlib.contextmanager
def in_training(mounted: Mounted, words: tuple[str, ...], steps: int = 1) -> Iterator[Training]:
    """A container that has made `steps` training steps, and is then left to go on."""
    name = f"fuselip-test-{os.getpid()}"
    options = ("--rm", "--name", name, "-u", f"{USER}:{USER}", *CLOSED, *mounted.options)
    checkpoints = mounted.models / ".work" / "fuselip-rocov2-tiny" / "checkpoints"
    log = mounted.place / "stderr"
    with log.open("w") as stderr:
        child = subprocess.Popen([DOCKER, "run", *options, "bacor_fuselip_train", *words], stderr=stderr)
    late = time.monotonic() + 500
    try:
        # The checkpoints, and the curves beside them, are removed when a training ends.
        while child.poll() is None and steps > sum(
            curves.read_bytes().count(b"\n") for curves in checkpoints.glob("*/history.jsonl")
        ):
            assert time.monotonic() < late, log.read_text()[-2000:]
            time.sleep(0.05)
        yield Training(name, child, log)
    finally:
        subprocess.run([DOCKER, "rm", "-f", name], capture_output=True)
        child.wait(timeout=100)


@pytest.mark.long
def test_another_user_trains_stops_resumes_and_registers(mounted: Mounted) -> None:
    """docker stop in the middle of training saves a checkpoint; docker run again ends with a registered model."""
    words = ("tiny", *SHORT, "train.steps=16")
    with in_training(mounted, words) as training:
        code, said = training.end("stop", "-t", "60")
    assert code == Interrupted.exit_code, said[-2000:]
    assert "saved; the same command resumes it" in said.splitlines()[-1]
    done = run("bacor_fuselip_train", *words, options=(*CLOSED, *mounted.options))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming from step" in done.stderr and "codebook: nothing has changed" in done.stderr
    model = mounted.models / "fuselip-rocov2-tiny"
    assert {"config.json", "model.safetensors"} <= {path.name for path in model.iterdir()}
    assert (mounted.logs / model.name / "report" / "index.html").is_file()
    with sqlite3.connect(mounted.logs / "mlflow" / "mlflow.db") as store:
        assert store.execute("SELECT name, version FROM model_versions").fetchall() == [("fuselip-rocov2-tiny", 1)]
    assert json.loads((mounted.logs / model.name / "registered.json").read_text())["version"] == 1
    for folder in (mounted.models, mounted.logs):
        assert {path.stat().st_uid for path in folder.rglob("*")} == {USER}


@pytest.mark.long
def test_a_killed_container_goes_on_and_keeps_others_out(mounted: Mounted) -> None:
    """On the folders of the test before: only the training is made again."""
    words = ("tiny", *SHORT, "train.steps=40", "train.checkpoint_every=4", "train.seed=1")
    lock = mounted.models / ".work" / "fuselip-rocov2-tiny" / ".lock"
    lock.touch()
    os.chown(lock, USER, USER)  # as the container's user makes it; this test's may be root
    with sole_process(lock, FuselipError("held already")):
        other = mounted.run(*words)
    assert other.returncode == 1 and "another container is using" in other.stderr.splitlines()[-1], other.stderr
    with in_training(mounted, words, steps=6) as training:
        code, said = training.end("kill")
    assert code == 128 + signal.SIGKILL and "error: " not in said, said[-2000:]
    done = mounted.run(*words, options=("--shm-size", "1m"))
    assert done.returncode == 0, done.stderr[-2000:]
    step = re.search(r"resuming from step (\d+)", done.stderr)
    assert step and 4 <= int(step[1]) < 40 and int(step[1]) % 4 == 0, done.stderr[-2000:]
    measured = mounted.run("evaluate", *words, "evaluate.examples=1")
    assert measured.returncode == 0 and "evaluate: starting" in measured.stderr, measured.stderr[-2000:]
    tokens = mounted.run("tokenize", *words)
    assert tokens.returncode == 0 and tokens.stderr.count("nothing has changed") == 3, tokens.stderr[-2000:]


@pytest.mark.long
def test_the_trained_model_embeds_in_the_same_image(mounted: Mounted) -> None:
    import pyarrow.parquet as pq

    if not (mounted.models / "fuselip-rocov2-tiny").is_dir():
        pytest.skip("needs the model of the test before")
    (mounted.logs / "texts.csv").write_text("text\nchest radiograph\nabdominal CT\n")
    words = ("embed", "fuselip-rocov2-tiny", "/workspace/logs/texts.csv")
    done = run("bacor_fuselip_train", *words, options=(*CLOSED, *mounted.options))
    assert done.returncode == 0, done.stderr[-2000:]
    table = pq.read_table(mounted.logs / "embeddings.parquet")
    assert table["text"].to_pylist() == ["chest radiograph", "abdominal CT"]


@pytest.mark.long
def test_the_registered_model_is_served_as_in_the_stack(mounted: Mounted) -> None:
    """The model server of docker/compose.yaml: MLflow's own, in the training image, with a read-only root."""
    if not (mounted.logs / "mlflow" / "mlflow.db").is_file():
        pytest.skip("needs the model of the tests before")
    service = services()["models"]
    words = [
        re.sub("^--model-uri=.*", "--model-uri=models:/fuselip-rocov2-tiny/1", word) for word in service["command"]
    ]
    assert words != service["command"] and service["read_only"]
    options = ("--read-only", "--tmpfs", service["tmpfs"][0], "-v", f"{mounted.logs}:/workspace/logs")
    options += ("-e", "MLFLOW_TRACKING_URI=sqlite:////workspace/logs/mlflow/mlflow.db")
    options += ("--entrypoint", service["entrypoint"][0])
    code = (
        "import json, urllib.request as r; "
        "asked = json.dumps({'dataframe_records': [{'text': 'chest radiograph'}]}).encode(); "
        "call = r.Request('http://127.0.0.1:8080/invocations', asked, {'Content-Type': 'application/json'}); "
        "print(json.loads(r.urlopen(call).read())['predictions'])"
    )
    check = service["healthcheck"]["test"][1:]
    with serving("bacor_fuselip_train", *words, check=check, options=options) as name:
        done = ask(name, code)
    assert done.returncode == 0 and done.stdout.count(",") >= 100, done.stderr


@pytest.mark.long
def test_torch_compile_finds_its_compiler(mounted: Mounted) -> None:
    code = "import torch; print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(8)).sum().item())"
    options = ("--read-only", "--tmpfs", "/tmp:exec", "--entrypoint", "/usr/local/bin/entrypoint")
    done = run("bacor_fuselip_train", "python", "-c", code, options=options)
    assert done.stdout.strip() == "8.0", done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.parametrize(("name", "buildkit"), [("train", True), ("download", False)])
def test_a_second_build_after_a_change_takes_no_new_libraries(name: str, buildkit: bool, tmp_path: Path) -> None:
    client = engine()
    build(name, "latest" if buildkit else "legacy", buildkit)
    changed = copy_repository(tmp_path / "repository")
    with (changed / "fuselip_core" / "stages.py").open("a") as module:
        module.write("# changed\n")
    try:
        said = build(name, "changed", buildkit, changed)
        code = "import fuselip_core; print(open(fuselip_core.__path__[0] + '/stages.py').read())"
        shown = run(f"bacor_fuselip_{name}:changed", "-c", code, options=("--entrypoint", "python"))
    finally:
        client.images.remove(f"bacor_fuselip_{name}:changed")
    assert ("CACHED" if buildkit else "Using cache") in said and "Downloading" not in said
    assert shown.stdout.rstrip().endswith("# changed"), shown.stderr
