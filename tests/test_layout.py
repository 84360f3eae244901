"""The shape of the repository: who may import whom, what DVC watches, what must not be in the tree."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import (
    REPOSITORY,
    arrows_between_files,
    arrows_between_rooms,
    circles,
    code_of_stage,
    imported_names,
    module_files,
    project_modules,
    room_of,
    sections_of_stage,
    tree_of,
)

from fuselip_core.config import SECTIONS, STAGES

MODULES = module_files()
# Rooms from the ground up. A room imports its own modules and those of rooms below; data and model never meet.
RANKS = (
    ("errors",),
    ("distributed", "files", "html", "lock", "progress"),
    ("images",),
    ("recipes",),
    ("config",),
    ("data",),
    ("data.dicom", "data.download", "data.phantom", "data.shards", "data.tokens"),
    ("data.sources",),
    ("data.inspect", "data.prepare"),
    ("model",),
    ("encoding", "request_rules"),
    ("tracking",),
    ("training",),
    ("evaluation",),
    ("evaluation.report",),
    ("generation", "tokenizer"),
    ("cards",),
    ("registry",),
    ("search",),
    ("monitoring",),
    ("serving",),
    ("preflight", "stages"),
    ("cli",),
    ("__main__", "container"),
    ("flows.environment",),
    ("flows.run",),
    ("flows.reproduce",),
    ("flows.page",),
    ("flows.tasks",),
    ("flows.command_line",),
    ("flows.study",),
    ("flows.download", "flows.pipeline", "flows.search", "flows.sweep", "flows.tokenize_map"),
    ("flows.evaluate", "flows.monitor", "flows.promote", "flows.register", "flows.train"),
    ("flows.server",),
)
FRONT_DOORS = ("flows", "fuselip_core")  # names imported on first use, settings of the environment
MOST_LINES = 60


def rank_of(module: str) -> int:
    """The place in RANKS of the module's room; a module without one fails until somebody decides where it belongs."""
    room = room_of(module, MODULES).removeprefix("fuselip_core.")
    ranks = [rank for rank, rooms in enumerate(RANKS) if room in rooms]
    assert ranks, f"{module}: its room {room} has no rank in tests/test_layout.py"
    return ranks[0]


@pytest.mark.parametrize("module", [module for module in MODULES if module not in FRONT_DOORS])
def test_imports_point_one_way(module: str) -> None:
    mine, room = rank_of(module), room_of(module, MODULES)
    others = project_modules(imported_names(tree_of(MODULES[module])), MODULES) - set(FRONT_DOORS)
    wrong = [other for other in others if rank_of(other) >= mine and room_of(other, MODULES) != room]
    assert not wrong, f"{module} imports {wrong}: arrows go from the end of RANKS to its start"


def test_every_rank_is_of_a_room_that_exists() -> None:
    rooms = {room_of(module, MODULES).removeprefix("fuselip_core.") for module in MODULES}
    assert {room for rooms_of_rank in RANKS for room in rooms_of_rank} <= rooms


def test_no_imports_in_circles() -> None:
    assert not circles(arrows_between_files())
    assert not circles(arrows_between_rooms())


def test_circles_are_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e", "a"}}
    assert circles(arrows) == [["b", "c"], ["e", "f"]]


def test_data_and_model_never_meet_below_training() -> None:
    for here, there in (("data", "model"), ("model", "data")):
        for module, path in MODULES.items():
            if module.startswith(f"fuselip_core.{here}"):
                names = list(imported_names(tree_of(path)))
                assert not [name for name in names if name.startswith(f"fuselip_core.{there}")], module


def test_data_needs_no_torch() -> None:
    heavy = {"torch", "torchvision", "transformers", "open_clip"}
    for module, path in MODULES.items():
        if module.startswith("fuselip_core.data"):
            roots = {name.split(".")[0] for name in imported_names(tree_of(path))}
            assert not roots & heavy, f"{module} imports {roots & heavy}"


def test_core_knows_no_prefect() -> None:
    for module, path in MODULES.items():
        if module.startswith("fuselip_core"):
            roots = {name.split(".")[0] for name in imported_names(tree_of(path))}
            assert not roots & {"prefect", "dvc", "flows"}, module


def test_trackers_are_imported_in_two_rooms_and_lazily() -> None:
    for module, path in MODULES.items():
        roots = {name.split(".")[0] for name in imported_names(tree_of(path))}
        if roots & {"mlflow", "wandb"}:
            assert room_of(module, MODULES) in {"fuselip_core.tracking", "fuselip_core.registry"}, module
            at_import = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = [name for node in at_import for name in imported_names(ast.Module([node], []))]
            served = module == "fuselip_core.registry.served_model"  # MLflow runs this file
            assert served or not [name for name in names if name.startswith(("mlflow", "wandb"))], module


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_the_code_that_a_stage_runs(stage: str) -> None:
    wanted = set(code_of_stage(stage))
    watched = {dep for dep in stage_of(stage)["deps"] if dep.startswith("fuselip_core/")}
    assert watched == wanted, "dvc.yaml: `python tests/imports.py` writes the deps"


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_the_settings_that_a_stage_reads(stage: str) -> None:
    for params in stage_of(stage)["params"]:
        ((_, watched),) = params.items()
        read = sections_of_stage(stage) & set(SECTIONS)
        if stage == "evaluate":
            # Named in the report: of the first three a change makes another model, gates are dated there.
            read -= {"train", "prepare", "model", "register"}
        if stage == "register":
            read -= {"model"}  # named in tags
        assert read <= set(watched), f"dvc.yaml, params of {stage}: add {read - set(watched)}"


def stage_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"][name]


def test_functions_stay_short() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= MOST_LINES, f"{module}.{node.name} has {lines} lines"


def tracked() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [REPOSITORY / name for name in listed if (REPOSITORY / name).is_file()]


def test_folders_named_like_libraries_hold_no_python() -> None:
    names = {path.relative_to(REPOSITORY) for path in tracked()}
    assert not [name for name in names if name.parts[0] in {"mlflow", "docker"} and name.suffix == ".py"]
    assert Path("tests/__init__.py") not in names
    assert not [name for name in names if name.name == "uv.lock"]


def test_no_file_names_a_package_registry() -> None:
    # Put together here, so that this file is no exception.
    hosts = re.compile("|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch\.org")))
    for path in tracked():
        if path.suffix not in {".png", ".jpg", ".safetensors"}:
            assert not hosts.search(path.read_text(encoding="utf-8", errors="replace")), path


def test_lock_is_hashed_and_whole() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    pins = re.findall(r"^([a-z0-9._-]+)==", lock, flags=re.MULTILINE)
    assert len(pins) == len(set(pins)) > 100
    assert "torch" in pins and "dvc" in pins
    entries = re.split(r"\n(?=[a-z0-9])", lock)
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry.splitlines()[0] and entry[0] != "#")
