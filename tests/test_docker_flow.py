"""Flows whose stages run in the images, and images that run flows and servers: Prefect's, its worker, MLflow's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import CLOSED, REPOSITORY, ask, engine, image_of, run, services, serving
from fake_hub import FakeHub
from repository_copy import copy_of, copy_repository, dvc, run_flow, terminate_flow

from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.registry.state import results_of

SHORT = (
    *("codebook.steps=2", "codebook.batch_size=8", "train.steps=4", "train.batch_size=16", "train.validate_every=2"),
    *("tokenize.views=1", "evaluate.batch_size=16", "prepare.dev_share=0.2", "prepare.extra_pairs=[concepts]"),
)
pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


@pytest.fixture
def boxed(template: Path, tmp_path: Path) -> Path:
    """A copy of the repository with stand-ins for the stages, for containers."""
    image_of("download")
    image_of("train")
    return copy_of(template, tmp_path / "repository")


def sentences(stderr: str) -> list[str]:
    """What a flow ended with; Prefect's server says good-bye behind it."""
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_a_flow_in_containers_skips_what_is_done_and_tells_what_failed(boxed: Path) -> None:
    done = run_flow(boxed, "--runner", "docker")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = (boxed / "calls").read_text().split()
    assert stages == ["prepare", "codebook", "tokenize", "train", "evaluate", "register"]
    assert "up to date" in dvc(boxed, "status")
    (boxed / "order").write_text("train fail")
    again = run_flow(boxed, "--runner", "docker", "--set", "train.steps=7")
    assert again.returncode == 1 and sentences(again.stderr) == ["error: train: no luck in train; try again"]
    assert (boxed / "calls").read_text().split() == [*stages, "train"]
    assert not engine().containers.list(all=True, filters={"label": f"fuselip.repository={boxed}"})


def test_a_terminated_flow_stops_its_container(boxed: Path) -> None:
    code, said = terminate_flow(boxed, "--runner", "docker")
    assert code == 128 + signal.SIGTERM and (boxed / "saved").is_file(), said
    assert sentences(said) == ["error: stopped; the same command resumes it"]
    assert not engine().containers.list(all=True, filters={"label": f"fuselip.repository={boxed}"})


def test_refused_gpus_end_the_flow_with_what_to_install(boxed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "nvidia" in engine().info().get("Runtimes", {}):
        pytest.skip("this engine has GPUs to give")
    command = [sys.executable, "-m", "flows.pipeline", "--runner", "docker"]
    environment = {**os.environ, "FUSELIP_GPUS": "all"}
    done = subprocess.run(command, cwd=boxed, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 1 and "nvidia-container-toolkit" in "".join(sentences(done.stderr)), done.stderr


def test_containers_and_processes_make_the_same_bytes(tmp_path: Path) -> None:
    """The real stages, from raw data to a registered model, once each way; DVC finds nothing to do in either."""
    image_of("download")
    image_of("train")
    repository = copy_repository(tmp_path / "repository")
    draw_data_set(tmp_path / "sample", 0, {"train": 48, "valid": 16, "test": 16})
    words = ["--source", "phantom", "--root", str(tmp_path / "sample")]
    words += [word for correction in SHORT for word in ("--set", correction)]
    for runner in ("docker", "process"):
        done = run_flow(repository, *words, "--runner", runner, "--name", runner)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "up to date" in dvc(repository, "status", f"runs/{runner}/dvc.yaml")
    made = [results_of(repository / "runs" / runner / "artifacts") for runner in ("docker", "process")]
    assert len(made[0]) == 3 and made[0] == made[1]
    owners = {path.stat().st_uid for path in (repository / "runs" / "docker").rglob("*")}
    assert owners == {os.getuid()}


def test_a_download_flow_fetches_in_its_container(tmp_path: Path) -> None:
    image_of("download")
    repository = copy_repository(tmp_path / "repository")
    hub = FakeHub()
    hub.add_repo("owner/set", {"data/train.parquet": b"rows" * 50_000, "README.md": b"a set"}, {"data/train.parquet"})
    command = [sys.executable, "-m", "flows.download", "--runner", "docker", "--folder", "set"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "FUSELIP_NETWORK": "host"}
    options: dict[str, Any] = {"cwd": repository, "env": environment, "capture_output": True, "text": True}
    with hub.running():
        done = subprocess.run([*command, "--source", "hub:owner/set"], timeout=500, **options)
        wrong = subprocess.run([*command, "--source", "hub:owner/other"], timeout=500, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (repository / "set" / "data" / "train.parquet").read_bytes() == b"rows" * 50_000
    assert (repository / "set.dvc").is_file() and "up to date" in dvc(repository, "status", "set.dvc")
    assert (repository / "set" / "README.md").stat().st_uid == os.getuid()
    assert wrong.returncode == 1 and "owner/other" in "".join(sentences(wrong.stderr)), wrong.stderr


def test_the_server_image_runs_prefects_server() -> None:
    service = services()["prefect"]
    with serving(image_of("docker/server"), *service["command"], check=service["healthcheck"]["test"][1:]) as name:
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:4200/api/admin/version').read().decode())"
        done = ask(name, code)
        assert done.stdout.strip() == '"3.8.8"', done.stderr


def test_the_server_image_runs_mlflows_server() -> None:
    service = services()["mlflow"]
    stores = ("--backend-store-uri=", "--artifacts-destination=")
    words = [word for word in service["command"] if not word.startswith(stores)]
    # The database's address holds its password, so it is in the environment and not among the arguments.
    assert len(service["command"]) - len(words) == 1
    words += ["--backend-store-uri=sqlite:////tmp/mlflow.db", "--artifacts-destination=/tmp/artifacts"]
    with serving(image_of("docker/server"), *words, check=service["healthcheck"]["test"][1:]) as name:
        code = (
            "import mlflow; mlflow.set_tracking_uri('http://127.0.0.1:5000'); "
            "print(mlflow.create_experiment('seen'), mlflow.get_experiment_by_name('seen').name)"
        )
        done = ask(name, code)
        assert done.stdout.split()[-1:] == ["seen"], done.stderr


def test_the_server_image_has_what_the_worker_of_the_stack_calls(template: Path) -> None:
    image = image_of("docker/server")
    mount = ("-v", f"{template}:{template}:ro", "-w", str(template), "-e", f"PYTHONPATH={template}")
    code = "import docker, dvc, flows.server.serve, flows.server.worker, flows.run.container, boto3, psycopg2; "
    code += "import fuselip_core.registry.register"  # which flows import when a run is registered again, or promoted
    done = run(image, "python", "-c", code, options=(*CLOSED, *mount))
    assert done.returncode == 0, done.stderr
    # DVC calls this stage in the worker's own container, not in one of the stages' images.
    words = ("python", "-m", "fuselip_core", "settings", "--settings", "params.yaml", "--out", "/tmp/settings.yaml")
    done = run(image, *words, options=(*CLOSED, *mount))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a repository to another user")
def test_the_worker_image_runs_a_flow_with_all_of_its_stages(boxed: Path) -> None:
    """As in a pod: the checkout is mounted, and the flow and its stages run in one container."""
    image = image_of("docker/worker")
    subprocess.run(["chown", "-R", "12345:12345", str(boxed)], check=True)
    boxed.parent.chmod(0o755)
    mount = ("-v", f"{boxed}:{boxed}", "-w", str(boxed), "-e", f"PYTHONPATH={boxed}")
    done = run(image, "python", "-m", "flows.pipeline", options=(*CLOSED, *mount))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (boxed / "calls").read_text().split()[-1] == "register"
    status = run(image, "dvc", "status", options=(*CLOSED, *mount))
    assert status.returncode == 0 and "up to date" in status.stdout, status.stderr


def test_the_worker_image_looks_after_lost_runs_without_a_checkout() -> None:
    """What the cron job of docker/kubernetes/recover.yaml calls without a server, and what a pod clones with."""
    job = yaml.safe_load((REPOSITORY / "docker" / "kubernetes" / "recover.yaml").read_text())
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    image = image_of(f"docker/{container['image'].removeprefix('bacor_fuselip_')}")
    around = ("-e", "PREFECT_HOME=/tmp/prefect", "-e", "PREFECT_API_URL=http://127.0.0.1:9/api")
    done = run(image, *container["args"], options=(*CLOSED, *around))
    assert done.returncode == 1 and "error: no Prefect server answers at http://127.0.0.1:9/api" in done.stderr
    done = run(image, "sh", "-c", "git --version && python -c 'import s3fs, dvc_s3'", options=CLOSED)
    assert done.returncode == 0, done.stderr
