"""Settings: recipes, corrections, overrides, and what is said about wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fuselip_core.config import (
    RECIPE_FOLDER,
    SECTIONS,
    Settings,
    SettingsError,
    describe_settings,
    differences,
    layers_of,
    load_settings,
    merge,
    recipe_names,
)
from fuselip_core.data.transforms import FAMILIES, GENERAL
from fuselip_core.recipes.read import recipe_layers


@pytest.mark.parametrize("name", ["base", *recipe_names()])
def test_recipe_states_only_its_differences(name: str) -> None:
    """What a recipe repeats from its parent, or from the defaults, would have to be changed in two places."""
    without = Settings().model_dump(mode="json", by_alias=True)
    layers = recipe_layers(name)
    for layer in layers[:-2:2]:  # the others hold at one size
        without = merge(without, layer.values)
    for section, values in layers[-2].values.items():
        repeated = [field for field, value in values.items() if without[section][field] == value]
        assert not repeated, f"{name}: {section} repeats {repeated}"


def test_recipes_fit_on_a_few_pages() -> None:
    lines = [line for path in RECIPE_FOLDER.glob("*.yaml") for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) < 450


def test_every_value_names_its_source(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("recipe: fuselip-rocov2\ntrain: {batch_size: 96}\n")
    overrides = ["train.warmup_steps=10", "evaluate.seed=3"]
    layers = layers_of(path, overrides, size="base")
    described = describe_settings(load_settings(path, overrides, size="base"), layers)
    section, origins = "", {}
    for line in described.splitlines():
        if not line.startswith(" "):
            section = line.partition(":")[0]
        elif found := re.fullmatch(r"  (\w+): .*  # \[([^]]*)\] .*", line):
            origins[f"{section}.{found[1]}"] = found[2]
    fields = {
        f"{section}.{name}"
        for section in (*SECTIONS, "monitor")
        for name in Settings().model_dump(by_alias=True)[section]
    }
    assert set(origins) == fields
    expected = {
        "prepare.limit": "default",
        "tokenize.views": "base",
        "train.epochs": "fuselip-rocov2",
        "train.interpolate": "fuselip-rocov2",
        "train.init": "fuselip-rocov2 at size base",
        "train.batch_size": str(path),
        "train.warmup_steps": "--set",
        "train.warmup_share": "--set",  # emptied by warmup_steps
        "model.size": "--size",
    }
    assert {name: origins[name] for name in expected} == expected


@pytest.mark.parametrize("name", recipe_names())
def test_every_field_says_its_meaning(name: str) -> None:
    described = describe_settings(load_settings(recipe=name), layers_of(recipe=name))
    assert "None" not in described and "[]" not in described.replace(": []", "")
    assert yaml.safe_load(described)["train"]["steps"] == load_settings(recipe=name).train.steps
    assert all("#" in line for line in described.splitlines() if line.startswith("  "))


PUBLISHED = [f"{family}-{data}" for family in ("fuselip", "siglip-sf", "siglip-mlf") for data in ("cc3m", "cc12m")]
ADAPTED = [f"{family}-rocov2" for family in ("fuselip", "siglip-sf", "siglip-mlf")]


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
@pytest.mark.parametrize("name", PUBLISHED + ADAPTED)
def test_recipe_holds_at_every_size(name: str, size: str) -> None:
    settings = load_settings(recipe=name, size=size)
    assert (settings.model.size, settings.model.family) == (size, name.rpartition("-")[0])
    assert settings.evaluate.split != "dev" or settings.prepare.dev_share > 0
    if settings.model.family != "fuselip":
        assert settings.train.mask_weight == 0, "the baselines predict no tokens"
    if settings.train.init is None:
        assert not any("adaptation/" in gate.metric for gate in settings.register_.gates), "nothing before to compare"


@pytest.mark.parametrize("name", PUBLISHED)
def test_pretraining_is_as_published(name: str) -> None:
    """Section 4 and the training scripts of FuseLIP (arXiv 2506.03096)."""
    train = load_settings(recipe=name).train
    cc12m = name.endswith("cc12m")
    assert (train.learning_rate, train.warmup_steps, train.clip_norm, train.batch_size) == (1e-3, 12_000, 1.0, 2048)
    assert (train.weight_decay, train.epochs) == ((0.5, 16) if cc12m else (1.0, 8))
    assert (train.steps, train.warmup_share, train.mixture_by, train.grouped) == (None, None, "passes", True)
    assert train.mixture["vg:vqa"] == (1.0 if cc12m else 0.5)
    if name.startswith("fuselip"):
        assert (train.mask_probability, train.mask_weight) == (0.1, 0.25)


def test_a_size_changes_what_the_recipe_says_and_a_correction_wins(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("recipe: fuselip-rocov2\nmodel: {size: base}\n")
    base = load_settings(path)
    assert base.train.init == base.codebook.init == "chs20/FuseLIP-B-CC12M-MM"
    assert load_settings(path, ["train.init=mine"]).train.init == "mine"
    assert load_settings(path, size="tiny").train.init is None
    assert load_settings(path, ["model.size=large"]).train.interpolate == 1.0


def test_a_correction_in_steps_takes_back_epochs_and_the_other_way_round() -> None:
    train = load_settings(recipe="fuselip-cc3m", overrides=["train.steps=100", "train.warmup_share=0.1"]).train
    assert (train.steps, train.epochs, train.warmup_share, train.warmup_steps) == (100, None, 0.1, None)
    train = load_settings(recipe="sample", overrides=["train.steps=9", "train.epochs=2"]).train
    assert (train.steps, train.epochs) == (None, 2.0)


def test_recipes_are_compared_field_by_field() -> None:
    found = differences(load_settings(recipe="fuselip-cc3m"), load_settings(recipe="fuselip-cc12m"))
    assert found["train.epochs"] == ("8.0", "16.0") and found["train.weight_decay"] == ("1.0", "0.5")
    assert not differences(load_settings(recipe="sample"), load_settings(recipe="sample"))


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
        ("train.mixture={vqa: 0}", ["mixture needs at least one positive weight"]),
        ("train.mixture={caption: 1, web:caption: 1}", ["mixture names web", "no folder"]),
        ("train={steps: 5, epochs: 2}", ["either steps or epochs"]),
        ("train={steps: 50, warmup_steps: 50}", ["warmup_steps 50", "below the run's 50 steps"]),
        ("train.accumulation=7", ["batch_size 128 is not a multiple of accumulation 7"]),
        ("tokenize={crops: device, rotation: 5.0}", ["turned and varied in contrast by Pillow"]),
        ("train.interpolate=0.5", ["interpolate below 1", "name a checkpoint"]),
        ("train.steps=true", ["train.steps", "valid integer", "not True"]),
        ("train.steps=10.0", ["train.steps", "valid integer"]),
        ("train.steps=010", ["'010' can be read in two ways"]),
        ("train.steps=1_000", ["'1_000' can be read in two ways"]),
        ("train.steps=1:30", ["'1:30' can be read in two ways"]),
        ("train.learning_rate=inf", ["train.learning_rate", "valid number", "not 'inf'"]),
        ("train.learning_rate=.inf", ["train.learning_rate", "finite number"]),
        ("train.learning_rate=.nan", ["train.learning_rate"]),
        ("train.learning_rate=true", ["train.learning_rate", "valid number"]),
        ("train.mixture={vqa: .nan}", ["train.mixture.vqa"]),
        ("train.compile=yes", ["'yes' can be read in two ways", "true or false"]),
        ("train.compile='yes'", ["train.compile", "valid boolean"]),
        ("train.compile=1", ["train.compile", "valid boolean"]),
        ("register.name=off", ["'off' can be read in two ways", "quotes"]),
        ("prepare.root=2026-11-28", ["'2026-11-28' can be read in two ways"]),
        ("train={steps: 5, steps: 6}", ["'steps' is given twice"]),
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


def test_misspelt_recipe_is_told_its_likely_name() -> None:
    with pytest.raises(SettingsError, match=r"'fuselip-roco'; did you mean fuselip-rocov2\? there are: "):
        load_settings(None, recipe="fuselip-roco")


@pytest.mark.parametrize("content", ["train: {steps: 3}\ntrain: {seed: 1}\n", "train:\n  steps: 3\n  steps: 4\n"])
def test_a_key_given_twice_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"params\.yaml is no valid YAML: '(train|steps)' is given twice"):
        load_settings(path)


def test_plain_values_are_read_as_before() -> None:
    words = ["train.learning_rate=1e-3", "train.seed=0", "train.compile=true", "register.name='off'", "train.ema=.5"]
    settings = load_settings(overrides=words)
    train = settings.train
    assert (train.learning_rate, train.seed, train.compile, train.ema) == (1e-3, 0, True, 0.5)
    assert settings.register_.name == "off"


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


def test_overrides_of_one_mixture_add_up_and_replace_the_recipes() -> None:
    words = ["train.mixture.vqa=0.3", "train.mixture.region=0.7"]
    assert load_settings(recipe="sample", overrides=words).train.mixture == {"vqa": 0.3, "region": 0.7}
    assert load_settings(recipe="sample", overrides=words[:1]).train.mixture == {"vqa": 0.3}


@pytest.mark.parametrize(("data", "share"), [("cc3m", 0.1), ("cc12m", 0.029)])
def test_transformations_have_the_published_share_of_pretraining(data: str, share: float) -> None:
    """Of the pairs that an epoch draws of the data set's own images, from the recipe's passes and edited share."""
    draws = {name: weight / FAMILIES[name].training for name, weight in GENERAL.items()}
    variants = sum(GENERAL.values()) / sum(draws.values())
    for family in ("fuselip", "siglip-sf", "siglip-mlf"):
        settings = load_settings(recipe=f"{family}-{data}")
        assert settings.prepare.extra_pairs == ("general-edits",) and settings.train.grouped
        edits = settings.train.mixture["edit"] * settings.prepare.edited_share * variants
        captions = settings.train.mixture["caption"]
        assert edits / (edits + captions) == pytest.approx(share, rel=0.01)
        # Every image once an epoch: as a caption, or with a group of edits.
        assert captions + edits / variants == pytest.approx(1.0, abs=0.002)
