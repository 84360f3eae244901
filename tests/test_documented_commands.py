"""Every command that a page names, a message prints or a run ends with is executed, in a shell without an environment.

One small `make demo` serves all of them; RULES says for each how it is tried. What takes longer is marked `slow`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from documented_commands import Documented, documented_commands, next_commands
from fake_hub import FakeHub
from make_dicom import picture, save
from prefect_stack import free_port, wait_until
from repository_copy import add_environment, bare_environment
from training_data import SHAPES, draw, write_raw

pytestmark = pytest.mark.timeout(900)


class Rule(NamedTuple):
    """How a command is tried: what replaces parts of it, or the whole of it where it cannot run here."""

    swap: Mapping[str, str] = MappingProxyType({})  # parts of the command, and what stands there in the test
    more: str = ""  # words added at its end
    before: tuple[str, ...] = ()  # commands that its reader has typed before
    server: str = ""  # a command that serves while this one is typed in another shell
    asks: str = ""  # path that a server must answer before Ctrl-C ends it
    instead: str = ""  # a stand-in for what needs an engine, a GPU, a network or hours
    fails: str = ""  # what it says when it fails as it must
    slow: bool = False


INDEX = ".venv/bin/fuselip index build artifacts/prepared"
PREPARED = ".venv/bin/fuselip data prepare --source rocov2 --root ROCOv2_data --out prepared/rocov2"
LOGS = "mkdir -p logs && cp -r mlflow logs/"  # a container's store lies in logs/mlflow, made elsewhere
DELETED = (  # the run that a model was registered from
    'RUN=$(sed -n \'s/.*"mlflow_run_id": "\\(.*\\)".*/\\1/p\' artifacts/tracking/train/run.json) && '
    "MLFLOW_TRACKING_URI=sqlite:///mlflow/mlflow.db .venv/bin/mlflow runs delete --run-id $RUN"
)
MODEL = "models:/fuselip-sample-tiny@champion"
MINE = {"models:/fuselip-rocov2-small@champion": MODEL, "/data/archive-2026": "path/to/pictures", "/data/": "path/to/"}
FEW = 'SET="codebook.steps=2 train.steps=2 train.batch_size=4 train.validate_every=2 evaluate.examples=1"'
DRY = ".venv/bin/python -m flows.pipeline --dry-run"
NO_ENGINE = "DOCKER_HOST=unix:///no/engine {command}"  # Docker's client reads every word, then misses its engine
UNREACHED = "annot connect to the Docker daemon"
CURVES = "/ajax-api/2.0/mlflow/registered-models/search"

# The first that fits counts. {command} is the command, {port} a free port, {case} a case of the index.
RULES: dict[str, Rule] = {
    # The pipeline
    r"make demo": Rule(),
    r"make demo SET=\S+": Rule(swap={"=1000": "=8", "=12": "=8"}, slow=True),
    r"make demo SOURCE=\w+ ROOT=\S+": Rule(more=FEW, slow=True),
    r"make demo SOURCE=rocov2 ROOT=\S+ NAME=\S+ SET=.*": Rule(
        instead=f"{DRY} --source rocov2 --root path/to/ROCOv2 --name rocov2-small --set model.size=small"
    ),
    r"make demo SOURCE=\.\.\. ROOT=\.\.\.": Rule(swap={"...": "folder"}, fails="folder"),
    r".*python -m flows\.\w+ --help": Rule(),
    r"make setup|mkdir .*|\.venv/bin/pre-commit install": Rule(),
    # Servers
    r"MLFLOW_TRACKING_URI=\S+logs/mlflow\S+ make serve-ui": Rule(before=(LOGS,), more="PORT={port}", asks=CURVES),
    r"make serve-ui": Rule(more="PORT={port}", asks=CURVES, slow=True),
    r"make serve-model MODEL=\S+": Rule(more="PORT={port}", asks="/ping", slow=True),
    r"PATH=\S+ MLFLOW_\S+ mlflow models serve .*": Rule(swap={"5001": "{port}"}, asks="/ping", slow=True),
    r"curl .*/invocations .*": Rule(
        swap={"5001": "{port}", "-s": "-s --fail-with-body"},
        server=f"make serve-model MODEL={MODEL} PORT={{port}}",
        slow=True,
    ),
    r"\.venv/bin/fuselip app --compare-index \S+": Rule(
        swap={"index-base": "index"}, before=(INDEX,), more="--port {port}", asks="/ready", slow=True
    ),
    r"(\.venv/bin/)?fuselip app": Rule(before=(INDEX,), more="--port {port}", asks="/ready"),
    r"\.venv/bin/fuselip serve --model .*": Rule(swap=MINE, more="--port {port}", asks="/health", slow=True),
    r"curl .*/v1/search .*": Rule(
        swap={"8000": "{port}", "-s": "-s --fail-with-body"},
        before=(INDEX,),
        server=".venv/bin/fuselip serve --index index --port {port}",
        slow=True,
    ),
    r"make serve-flows": Rule(instead=".venv/bin/python -m flows.server.serve --help"),  # test_deployments.py
    r".*python -m flows\.server\.serve --port .*": Rule(more="--help"),
    r".*python -m flows\.server\.recover.*": Rule(instead=".venv/bin/python -m flows.server.recover --help"),
    r"export .*": Rule(),
    # Data
    r".*fuselip data download rocov2 .*": Rule(swap={"ROCOv2_data": "downloaded/rocov2"}),
    r"fuselip data download [\w-]+": Rule(more="--out downloaded/other"),
    r"\.venv/bin/fuselip data prepare --source dicom .*": Rule(
        swap={"FOLDER": "path/to/archive", "table.csv": "path/to/table.csv", "--set dicom.ocr=true": ""}
    ),
    r"\.venv/bin/fuselip data prepare .*": Rule(swap={"my/": "path/to/"}),
    r"\.venv/bin/fuselip data inspect .*": Rule(before=(PREPARED,)),
    r"\.venv/bin/fuselip data diff .*": Rule(swap={"prepared/old": "prepared/rocov2"}, before=(PREPARED,)),
    r"\.venv/bin/fuselip (data )?card.*|\.venv/bin/fuselip recipes show sample": Rule(before=("make demo",)),
    r"fuselip data find-files .*": Rule(
        swap={"FOLDER": "path/to/archive", "file-...": "file-0"}, fails="no file below"
    ),
    r"fuselip sample --out (data|HOLE)": Rule(swap={"--out data": "--out drawn", "HOLE": "drawn-too"}, slow=True),
    # Search
    r".*fuselip index build --dicomweb .*": Rule(  # test_dicomweb.py
        swap={"https://pacs.example": "http://127.0.0.1:9", **MINE}, fails="no DICOMweb server answers", slow=True
    ),
    r".*fuselip index build artifacts/prepared.*": Rule(),
    r".*fuselip index build path/.*": Rule(more="--index other", slow=True),
    r".*fuselip index build /.*": Rule(swap=MINE, more="--index other"),
    r".*fuselip index search --image scan\.png": Rule(before=(INDEX,), slow=True),
    r"fuselip index build ARCHIVE.*": Rule(swap={"ARCHIVE": "path/to/archive", "HOLE": "other"}, slow=True),
    r"\.venv/bin/fuselip index add .*": Rule(swap=MINE, before=(INDEX,), slow=True),
    r"\.venv/bin/fuselip index \w+.*": Rule(swap={**MINE, "case-0123456789abcdef0123": "{case}"}, before=(INDEX,)),
    r"\.venv/bin/fuselip embed .*": Rule(swap=MINE),
    # Monitoring and sweeps
    r"\.venv/bin/fuselip monitor .*": Rule(swap={"monitor seen": "monitor artifacts/prepared"}, slow=True),
    r"\.venv/bin/fuselip sweep .*": Rule(more="--dry-run", slow=True),
    # Models and tracking
    r"fuselip sync": Rule(before=("make demo",)),
    r".*python -m flows\.promote": Rule(more="--name fuselip-sample-tiny --version 1", slow=True),
    r"MLFLOW_TRACKING_URI=\S+ \.venv/bin/mlflow experiments restore .*": Rule(
        swap={"HOLE .": "sqlite:///mlflow/mlflow.db .", "HOLE": "1", "-id N": "-id 1"},
        before=(
            "MLFLOW_TRACKING_URI=sqlite:///mlflow/mlflow.db .venv/bin/mlflow experiments delete --experiment-id 1",
        ),
        slow=True,
    ),
    r"MLFLOW_TRACKING_URI=HOLE \.venv/bin/mlflow runs restore .*": Rule(
        swap={"HOLE .": "sqlite:///mlflow/mlflow.db .", "HOLE": "$RUN"}, instead=f"{DELETED} && {{command}}", slow=True
    ),
    r"\.venv/bin/fuselip evaluate --recipe .*": Rule(  # no Hub in reach
        swap={"artifacts/compared": "artifacts"}, fails="OWNER/NAME", slow=True
    ),
    r"(\.venv/bin/)?fuselip reproduce .*": Rule(  # test_reproduce.py
        instead=".venv/bin/fuselip reproduce --help", slow=True
    ),
    # What checks the project
    r"make (docs|lint)": Rule(slow=True),
    r"make test TESTS=.*|make test(-long)?|make test-docker": Rule(instead="make test TESTS=tests/test_errors.py"),
    r"\.ci/run|docker/backup\.sh .*|docker/restore\.sh .*": Rule(instead="bash -n {command}"),  # test_stack.py
    r"make (workflows|audit)": Rule(instead="make -n workflows audit"),  # both need a network
    r".*python tests/imports\.py": Rule(),
    r".*python benchmarks/repeat\.py brain-mri": Rule(instead=".venv/bin/python benchmarks/repeat.py list"),
    r".*python benchmarks/\w+\.py.*": Rule(more="--help", slow=True),
    # Docker, Prefect, DVC
    r"docker compose .*": Rule(instead="test -f docker/compose.yaml"),  # test_stack.py, test_compose.py
    r"docker stop.*": Rule(more=" container", instead=NO_ENGINE, fails=UNREACHED),
    r"docker build .*": Rule(
        swap={"-f HOLE": "-f Dockerfile.train", "HOLE": "train"}, instead=NO_ENGINE, fails=UNREACHED
    ),
    r"docker .*": Rule(swap={" -it ": " "}, instead=NO_ENGINE, fails=UNREACHED),
    r".*prefect (worker|work-pool|deploy|deployment|gcl) .*": Rule(instead=".venv/bin/prefect --help"),
    r"(\.venv/bin/)?dvc \w+.*": Rule(instead=".venv/bin/dvc --help"),
    # A verb within a sentence
    r"fuselip serve --observe": Rule(more="seen --help"),
    r"fuselip [a-z-]+( [a-z-]+)?( --(debug|exact))?|fuselip --version": Rule(more="--help"),
    r"(\.venv/bin/)?fuselip .*(NAME|HOLE)|\.venv/bin/fuselip vqa generate --help": Rule(
        swap={"NAME": "sample", "HOLE": "nowhere"}, more="--help"
    ),
}
REPOSITORY = Path(__file__).parents[1]


def rule_of(command: Documented) -> Rule | None:
    return next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, command.text)), None)


def parameters() -> Iterator[Any]:
    for command in documented_commands(REPOSITORY):
        rule = rule_of(command)
        yield pytest.param(command, marks=[pytest.mark.long] if rule and rule.slow else [], id=str(command))


class Checkout:
    """The demo's checkout and a shell in it; the same command is executed once."""

    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self.folder = folder
        self.environment = {**bare_environment(folder.parent / "home"), "HF_ENDPOINT": hub.url}
        self.done: dict[str, subprocess.CompletedProcess[str]] = {}

    def shell(self, text: str) -> subprocess.CompletedProcess[str]:
        if text not in self.done:
            self.done[text] = subprocess.run(
                ["bash", "-c", text], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=400
            )
        return self.done[text]

    @contextmanager
    def serving(self, text: str, address: str) -> Iterator[None]:
        """`text` serves until Ctrl-C; raises what it said if it ends before `address` answers."""
        log = self.folder.parent / "served"
        with log.open("w") as stream:
            process = subprocess.Popen(
                ["bash", "-c", text], cwd=self.folder, env=self.environment, stdout=stream, stderr=stream,
                process_group=0,
            )  # fmt: skip
        try:
            wait_until(lambda: process.poll() is not None or _answers(address), f"an answer of {address}", 200)
            assert process.poll() is None, log.read_text()
            yield
        finally:
            if process.poll() is None:
                subprocess.run(["kill", "-s", "INT", "--", f"-{process.pid}"], check=True)
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=20).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def checkout(
    demo_checkout: Path, demo: subprocess.CompletedProcess[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checkout]:
    """A copy of the finished demo, since the commands leave much behind and other tests look at the demo too."""
    assert demo.returncode == 0, demo.stderr[-3000:]
    folder = tmp_path_factory.mktemp("documented") / "repository"
    shutil.copytree(demo_checkout, folder, symlinks=True, ignore=shutil.ignore_patterns(".venv"))
    add_environment(folder)
    for name in ("ROCOv2_data", "path/to/ROCOv2"):
        write_raw(folder / name)
        for table in (folder / name).glob("*_captions.csv"):  # real captions have sentences, which recipes pair
            table.write_text(table.read_text().replace("is bright, seen", "is bright. The other is dark, seen"))
    rng = np.random.default_rng(0)
    for number in range(36):
        shape = SHAPES[number % 4]
        place = folder / "path" / "to" / "pictures" / ("train", "valid", "test")[number % 3] / shape
        place.mkdir(parents=True, exist_ok=True)
        draw(shape, rng).save(place / f"{number}.png")
        pixels = rng.integers(0, 255, (32, 32), dtype=np.uint8)
        scan = picture(pixels, Modality="CT", BodyPartExamined="CHEST", PatientID=f"patient {number}")
        save(scan, folder / "path" / "to" / "archive" / f"{number}.dcm")
    shutil.copy(place / f"{number}.png", folder / "scan.png")
    for name in ("scan.dcm", "ct.dcm"):
        save(scan, folder / name)
    (folder / "path" / "to" / "table.csv").write_text("file,text\n0.dcm,a lesion\n")
    hub = FakeHub()
    for name in ("eltorio/ROCOv2-radiology", "pixparse/cc3m-wds", "pixparse/cc12m-wds", "UCSC-VLAA/HQ-Edit"):
        hub.add_repo(name, {"README.md": b"licence", "data/train-0.parquet": b"rows", "0.tar": b"tar"}, set())
    for name in ("BoKelvin/SLAKE", "TIGER-Lab/MMEB-eval"):
        hub.add_repo(name, {"README.md": b"licence", "test.json": b"[]"}, set())
    with hub.running():
        found = Checkout(folder, hub)
        found.done["make demo"] = demo
        yield found


@pytest.mark.parametrize("command", [*parameters()])
def test_a_documented_command_does_what_it_says(command: Documented, checkout: Checkout) -> None:
    rule = rule_of(command)
    assert rule is not None, "RULES has no rule for it: say how it is tried"
    program = command.text.split()[0]
    if program in ("docker", "curl") and not shutil.which(program):
        pytest.skip(f"needs {program}")
    try_it(
        f".venv/bin/{command.text}" if command.sentence and command.text.startswith("fuselip ") else command.text,
        rule,
        checkout,
    )


def try_it(text: str, rule: Rule, checkout: Checkout) -> None:
    for earlier in rule.before:
        assert checkout.shell(earlier).returncode == 0, checkout.shell(earlier).stderr[-3000:]
    for part, other in rule.swap.items():
        text = text.replace(part, other)
    text = f"{text} {rule.more}".strip()
    text = rule.instead.replace("{command}", text) or text
    port = free_port()
    text = text.replace("{port}", str(port)).replace("{case}", a_case(checkout) if "{case}" in text else "")
    if rule.asks:
        with checkout.serving(text, f"http://127.0.0.1:{port}{rule.asks}"):
            return
    if rule.server:
        with checkout.serving(rule.server.replace("{port}", str(port)), f"http://127.0.0.1:{port}/ping"):
            done = checkout.shell(text)
    else:
        done = checkout.shell(text)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said[-3000:]
    assert (done.returncode == 0) != bool(rule.fails), said[-3000:]
    assert re.search(rule.fails, said), said[-3000:]


def a_case(checkout: Checkout) -> str:
    table = next((checkout.folder / "artifacts" / "prepared").glob("images-train-*.parquet"))
    return str(pq.read_table(table, columns=["case"])["case"][0])


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_commands_at_the_end_of_a_run_work(
    checkout: Checkout, demo: subprocess.CompletedProcess[str], slow: bool
) -> None:
    commands = next_commands(demo.stdout)
    assert len(commands) == 5, demo.stdout
    documented = {command.text for command in documented_commands(REPOSITORY)}
    for text in commands:
        rule = rule_of(Documented("the end of a run", text, False))
        assert rule is not None, text
        if rule.slow == slow and text not in documented:
            try_it(text, rule, checkout)
