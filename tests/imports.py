"""Which of the project's modules import which, read from the source without running it.

``python tests/imports.py`` writes into dvc.yaml which code each stage depends on.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fuselip_core.config import STAGES

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("fuselip_core", "flows")
# What a stage's output does not depend on: settings are parameters, the rest moves bytes or tells how far things are.
WITHOUT_EFFECT = (
    "fuselip_core",
    "fuselip_core.config",
    "fuselip_core.errors",
    "fuselip_core.files",
    "fuselip_core.lock",
    "fuselip_core.progress",
    "fuselip_core.recipes",
    "fuselip_core.stages",
    "fuselip_core.tracking",
)
WITHOUT_EFFECT_ON_STAGE = {
    # Only finds the tokenizer that codebook.init names.
    "codebook": ("fuselip_core.model.hub",),
    # Looks at the validation split for the curves.
    "train": ("fuselip_core.evaluation",),
}
# Folders whose files are told apart: their subfolders are rooms of their own.
HALLS = ("fuselip_core", "fuselip_core/data")


def module_files() -> dict[str, Path]:
    """Module name → file, of all modules of the project."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(node: ast.AST) -> Iterator[str]:
    """Full names that are imported anywhere below `node`, but for what only the type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            for alias in child.names:
                yield f"{child.module}.{alias.name}"
        yield from imported_names(child)


def project_modules(names: Iterator[str], modules: dict[str, Path]) -> set[str]:
    """Of imported names such as fuselip_core.files.sha256_of, the project's modules."""
    found = set()
    for name in names:
        module = name if name in modules else name.rpartition(".")[0]
        if module in modules:
            found.add(module)
    return found


def reachable(start: set[str], modules: dict[str, Path], leave_out: tuple[str, ...]) -> set[str]:
    """Everything that the modules in `start` import, themselves included, not going through `leave_out`."""
    todo, seen = set(start), set()
    while todo:
        module = todo.pop()
        if module in seen or module in leave_out or module.rpartition(".")[0] in leave_out[1:]:
            continue
        seen.add(module)
        todo |= project_modules(imported_names(tree_of(modules[module])), modules)
    return seen


def functions_of_stage(stage: str, modules: dict[str, Path]) -> list[ast.FunctionDef | ast.ClassDef]:
    """The stage's function in stages.py and everything there that it calls."""
    functions = {
        node.name: node
        for node in tree_of(modules["fuselip_core.stages"]).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    todo, seen = {stage}, set()
    while todo:
        name = todo.pop()
        seen.add(name)
        calls = (node.func for node in ast.walk(functions[name]) if isinstance(node, ast.Call))
        called = {function.id for function in calls if isinstance(function, ast.Name)}
        todo |= (called & functions.keys()) - seen
    return [functions[name] for name in seen]


def imports_of_stage(stage: str, modules: dict[str, Path]) -> set[str]:
    """Modules that a function of stages.py and the helpers it calls there import."""
    functions = functions_of_stage(stage, modules)
    return {name for node in functions for name in project_modules(imported_names(node), modules)}


def sections_of_stage(stage: str) -> set[str]:
    """Names X for which a stage, or a function it reaches that is given whole Settings, reads ``settings.X``."""
    modules = module_files()
    left_out = (*WITHOUT_EFFECT, *WITHOUT_EFFECT_ON_STAGE.get(stage, ()))
    reached = reachable(imports_of_stage(stage, modules), modules, left_out)
    functions: list[ast.AST] = [*functions_of_stage(stage, modules)]
    for name in reached:
        for node in ast.walk(tree_of(modules[name])):
            if isinstance(node, ast.FunctionDef) and "Settings" in map(_annotation, node.args.args):
                functions.append(node)
    nodes = (node for function in functions for node in ast.walk(function))
    return {
        node.attr.rstrip("_")
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "settings"
    }


def _annotation(argument: ast.arg) -> str:
    return ast.unparse(argument.annotation) if argument.annotation else ""


def code_of_stage(stage: str) -> list[str]:
    """Folders, and files of the halls, whose code the output of `stage` depends on; relative, sorted."""
    modules = module_files()
    left_out = (*WITHOUT_EFFECT, *WITHOUT_EFFECT_ON_STAGE.get(stage, ()))
    files = {modules[name] for name in reachable(imports_of_stage(stage, modules), modules, left_out)}
    found = {dependency_of(path) for path in files}
    return sorted(place for place in found if str(Path(place).parent) not in found)


def dependency_of(path: Path) -> str:
    """What DVC watches for a module: its folder, or the file itself where the folder holds other rooms."""
    folder = path.parent.relative_to(REPOSITORY)
    return str(path.relative_to(REPOSITORY) if str(folder) in HALLS else folder)


def room_of(module: str, modules: dict[str, Path]) -> str:
    """The folder of a module as a dotted name; a loose module of the top level is a room of its own."""
    folder = modules[module].parent.relative_to(REPOSITORY)
    return module if str(folder) in PACKAGES else ".".join(folder.parts)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other along `arrows` (name → names it imports), each sorted."""
    reached = {name: closure(name, arrows) for name in arrows}
    groups = {tuple(sorted({name} | {other for other in reached[name] if name in reached[other]})) for name in arrows}
    return sorted(list(group) for group in groups if len(group) > 1)


def closure(start: str, arrows: dict[str, set[str]]) -> set[str]:
    todo, seen = set(arrows[start]), set()
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= arrows[name] - seen
    return seen


def arrows_between_files() -> dict[str, set[str]]:
    modules = module_files()
    return {name: project_modules(imported_names(tree_of(path)), modules) - {name} for name, path in modules.items()}


def arrows_between_rooms() -> dict[str, set[str]]:
    modules = module_files()
    found: dict[str, set[str]] = {}
    for name, others in arrows_between_files().items():
        if modules[name].name != "__init__.py":
            room = room_of(name, modules)
            found.setdefault(room, set()).update(room_of(other, modules) for other in others)
    return {room: (others & found.keys()) - {room} for room, others in found.items()}


def write_deps(dvc_file: Path) -> None:
    """Replaces the code among each stage's `deps`; everything else in the file stays as it is."""
    text = dvc_file.read_text(encoding="utf-8")
    for stage in STAGES:
        found = re.search(rf"\n  {stage}:\n.*?\n    deps: \[(.*?)\n?\s*\]\n", text, flags=re.S)
        assert found, f"dvc.yaml has no stage {stage} with deps"
        others = [name.strip() for name in found[1].split(",") if not name.strip().startswith("fuselip_core/")]
        names = ", ".join(filter(None, [*others, *code_of_stage(stage)]))
        lines = textwrap.fill(names, 120, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
        text = f"{text[: found.start(1)]}\n{lines}{text[found.end(1) :]}"
    dvc_file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_deps(REPOSITORY / "dvc.yaml")
