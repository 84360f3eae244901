"""Settings: recipes, corrections, overrides, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fuselip_core.config import (
    RECIPE_FOLDER,
    SECTIONS,
    Settings,
    SettingsError,
    describe_settings,
    load_settings,
    merge,
    recipe_names,
)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_states_every_field(name: str) -> None:
    """A default that no recipe states would change runs behind DVC's back, which compares the recipes' values."""
    stated = yaml.safe_load((RECIPE_FOLDER / f"{name}.yaml").read_text())
    everything = Settings().model_dump(by_alias=True)
    assert set(stated) == set(SECTIONS)
    for section in SECTIONS:
        assert set(stated[section]) == set(everything[section]), f"{name}: {section}"


@pytest.mark.parametrize("name", recipe_names())
def test_every_field_says_its_meaning(name: str) -> None:
    described = describe_settings(load_settings(recipe=name))
    assert "None" not in described
    assert yaml.safe_load(described)["train"]["steps"] == load_settings(recipe=name).train.steps
    assert all("#" in line for line in described.splitlines() if line.startswith("  "))


def test_params_of_the_repository_are_valid_and_complete(repository: Path) -> None:
    content = yaml.safe_load((repository / "params.yaml").read_text())
    assert set(SECTIONS) <= set(content), "DVC needs every section in params.yaml, {} will do"
    assert load_settings(repository / "params.yaml").recipe == content["recipe"]


def test_file_corrects_recipe_and_override_corrects_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("recipe: sample\nsettings: x\nrepository: .\ntrain: {steps: 7, batch_size: 9}\nmodel:\n")
    settings = load_settings(path, ["train.steps=11", "train.mixture={vqa: 2}", "prepare.limit=null"])
    assert (settings.train.steps, settings.train.batch_size) == (11, 9)
    assert settings.train.mixture == {"vqa": 2.0}
    assert settings.prepare.limit is None
    assert settings.codebook == load_settings(recipe="sample").codebook


def test_recipe_and_artifacts_replace_the_files(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("recipe: sample\nartifacts: a\n")
    settings = load_settings(path, recipe="vqa-rad", artifacts=Path("b"))
    assert (settings.recipe, settings.artifacts, settings.prepare.source) == ("vqa-rad", Path("b"), "vqa-rad")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean steps"]),
        ("trane.steps=3", ["trane", "did you mean train"]),
        ("train.steps=0", ["train.steps", "greater than or equal to 1", "not 0"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("model.size=huge", ["model.size", "'tiny', 'small', 'base' or 'large'"]),
        ("train.mixture={vqa: 0}", ["mixture needs at least one kind"]),
        ("train=5", ["train"]),
        ("train.steps", ["section.field=value"]),
        ("train.steps=[1", ["no valid YAML"]),
    ],
)
def test_wrong_override_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(overrides=[override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["nope", "../recipes/sample", ""])
def test_unknown_recipe_lists_the_known(name: str) -> None:
    with pytest.raises(SettingsError, match="sample"):
        load_settings(None, recipe=name or "-")


@pytest.mark.parametrize("content", ["[1, 2]", "train: [", "train: 5"])
def test_broken_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"mine\.yaml"):
        load_settings(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--settings"):
        load_settings(tmp_path / "none.yaml")


def test_merge_replaces_lists_and_a_mixture_whole() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "mixture": {"x": 1}}
    assert merge(base, {"a": {"c": [3]}, "mixture": {"y": 1}}) == {"a": {"b": 1, "c": [3]}, "mixture": {"y": 1}}
    assert base["a"] == {"b": 1, "c": [1, 2]}
