"""Settings of a run: the sections of ``params.yaml``, and at the same time the parameters of the Prefect flows.

A run is described by a recipe (``fuselip_core/recipes/<name>.yaml``), corrected by a settings file (``params.yaml``)
and, last, by single overrides from the command line. Every value is checked here, before anything runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fuselip_core.errors import FuselipError

RECIPE_FOLDER = Path(__file__).parent / "recipes"

Size = Literal["tiny", "small", "base", "large"]
Family = Literal["fuselip", "siglip-sf", "siglip-mlf"]
SourceName = Literal[
    "phantom",
    "rocov2",
    "vqa-rad",
    "slake",
    "cc3m",
    "cc12m",
    "cc3m-vqa",
    "cc12m-vqa",
    "hq-edit",
    "visual-genome",
    "open-images",
    "sugarcrepe",
    "imagenet",
    "mmeb-eval",
    "tgit",
    "dicom",
]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class SettingsError(FuselipError):
    """A recipe, a settings file or an override is wrong; the message says where and what to do."""

    exit_code = 2


class Section(BaseModel):
    """Base of all sections: unknown names are errors, values are fixed after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DicomSettings(Section):
    """How a DICOM folder becomes pictures and text."""

    text: Path | None = Field(None, description="CSV with a text column and a column that names images.")
    window: str = Field("file", description="CT window: the file's own, or a preset such as lung or bone.")
    frames: int = Field(1, ge=1, description="Frames of a multi-frame file: the middle one, or so many.")
    keep_burned_in: bool = Field(False, description="Take files that say they carry burned-in text.")
    keep_derived: bool = Field(False, description="Take segmentations, dose maps and the like.")
    ocr: bool = Field(False, description="Look for burned-in text in the pictures (needs the extra `ocr`).")
    key_file: Path | None = Field(None, description="Key of the pseudonyms; the user's own if empty.")
    valid_share: float = Field(0.1, ge=0, lt=0.5, description="Share of the patients kept for validation.")
    test_share: float = Field(0.1, ge=0, lt=0.5, description="Share of the patients kept for the test.")


class PrepareSettings(Section):
    """Raw data set → Parquet shards and a manifest."""

    source: SourceName = Field("phantom", description="Kind of data set found under `root`.")
    root: Path = Field(Path("data"), description="Folder of the raw data set, relative to the repository.")
    rows_per_shard: int = Field(2048, ge=1, description="Images in one Parquet shard.")
    workers: int = Field(2, ge=1, le=256, description="Processes that check images.")
    max_megapixels: float = Field(
        120.0, gt=0, le=178, description="Larger images are set aside, in megapixels; Pillow opens no larger than 178."
    )
    min_caption_words: int = Field(1, ge=0, description="Captions with fewer words are set aside.")
    extra_pairs: tuple[Literal["concepts"], ...] = Field(
        (), description="Kinds of pairs made of a captioned image beside its caption: the names of its concepts."
    )
    limit: int | None = Field(None, ge=1, description="At most this many images a split; all if empty.")
    dev_share: float = Field(
        0.0, ge=0.0, lt=1.0, description="Share of the training images held out by whole cases as the split `dev`."
    )
    shared_images: Literal["drop", "drop-copies", "keep"] = Field(
        "drop",
        description="Training images of which a held-out split has the image, a copy or the case: left out, left out "
        "but for the same case (as published splits have it), or kept and counted.",
    )
    near_duplicates: Literal["drop", "keep"] = Field(
        "drop", description="Training images that look like a held-out one: left out like copies, or not looked for."
    )
    dicom: DicomSettings | None = Field(
        None, description="For the source `dicom`; where empty, a dicom.yaml in its folder counts, else the defaults."
    )
    seed: int = Field(0, ge=0, description="Seed of every random choice made while splitting.")


class ModelSettings(Section):
    """Which encoder is trained; dimensions come from the size's preset unless given here."""

    family: Family = Field("fuselip", description="Early fusion, or one of the late-fusion baselines.")
    size: Size = Field("tiny", description="Preset of widths and depths.")
    context_length: int | None = Field(None, ge=8, le=1024, description="Tokens a sequence; the preset's if empty.")
    mask_token: bool = Field(True, description="Reserve a mask token (moves every joint image id by one).")
    end_of_image: bool = Field(False, description="Put an end-of-image token after the image codes.")


class CodebookSettings(Section):
    """The image tokenizer: trained from scratch, fine-tuned from a published one, or taken as it is."""

    init: str | None = Field(None, description="Folder or hub id of a tokenizer to start from; from scratch if empty.")
    steps: int = Field(600, ge=0, description="Optimiser steps; 0 takes the tokenizer of `init` as it is.")
    batch_size: int = Field(64, ge=1, description="Images a step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(1e-4, ge=0, description="On matrices only.")
    warmup_share: Share = Field(0.05, description="Share of the steps over which the learning rate rises.")
    continuous_share: Share = Field(
        0.0, description="Share of the steps trained without quantisation before k-means places the codes."
    )
    commitment_weight: float = Field(0.25, ge=0, description="Pulls latents towards their code.")
    codebook_weight: float = Field(1.0, ge=0, description="Pulls codes towards their latents.")
    gradient_weight: float = Field(0.5, ge=0, description="L1 on image gradients, keeps edges sharp; 0 turns it off.")
    perceptual_weight: float = Field(0.0, ge=0, description="Weight of the perceptual term; 0 turns it off.")
    perceptual_model: str | None = Field(
        None, description="Folder or hub id of a SigLIP baseline whose image features the perceptual term compares."
    )
    revive_every: int = Field(50, ge=0, description="Steps between replacements of unused codes; 0 never.")
    seed: int = Field(0, ge=0, description="Seed of weights, order and crops.")

    @model_validator(mode="after")
    def _perceptual_term_has_a_model(self) -> CodebookSettings:
        if self.perceptual_weight and not self.perceptual_model:
            raise ValueError("perceptual_weight is above 0, so perceptual_model must name a SigLIP checkpoint")
        return self


class TokenizeSettings(Section):
    """Images → codes, once."""

    views: int = Field(1, ge=1, le=64, description="Views an image: the evaluation view, then random crops.")
    crop_scale: tuple[float, float] = Field((0.8, 1.0), description="Area of a random crop, share of the image.")
    batch_size: int = Field(64, ge=1, description="Images a forward pass.")
    rows_per_shard: int = Field(4096, ge=1, description="Images tokenized between two points of resumption.")
    seed: int = Field(0, ge=0, description="Seed of the random crops.")


class TrainSettings(Section):
    """The joint encoder's training."""

    init: str | None = Field(None, description="Folder or hub id of a checkpoint to start from; random if empty.")
    codes_from_codebook: bool = Field(
        False, description="Begin the embeddings of image codes as a projection of the codebook, not as noise."
    )
    initial_embedding_std: float = Field(0.02, gt=0, description="Spread of token embeddings at the start.")
    initial_scale: float = Field(10.0, ge=1.0, le=100.0, description="Factor of similarities at the start.")
    initial_bias: float = Field(-10.0, le=0.0, description="What is added to scaled similarities at the start.")
    steps: int = Field(500, ge=1, description="Optimiser steps.")
    batch_size: int = Field(128, ge=2, description="Pairs a step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.2, ge=0, description="On matrices only.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's decay of first and second moments.")
    warmup_share: Share = Field(0.1, description="Share of the steps over which the learning rate rises.")
    clip_norm: float = Field(1.0, gt=0, description="Largest gradient norm.")
    mask_probability: Share = Field(0.1, description="Share of tokens hidden for masked multimodal modelling.")
    mask_weight: float = Field(0.25, ge=0, description="Weight of the masked-token loss; 0 turns it off.")
    mixture: dict[str, float] = Field(
        {"caption": 1.0}, description="Weight of each kind of pair in a batch (caption, vqa, ...)."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on CUDA.")
    validate_every: int = Field(100, ge=1, description="Steps between looks at the validation split.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    checkpoint_minutes: float = Field(10.0, gt=0, description="Minutes between checkpoints, whichever is first.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept on disk.")
    seed: int = Field(0, ge=0, description="Seed of weights, order and masks.")

    @model_validator(mode="after")
    def _mixture_has_weight(self) -> TrainSettings:
        if not self.mixture or min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0:
            raise ValueError("mixture needs at least one kind with a positive weight and none below zero")
        return self


class EvaluateSettings(Section):
    """Measures on a held-out split."""

    split: Literal["dev", "valid", "test"] = Field("test", description="Split that is measured; dev to choose settings.")
    batch_size: int = Field(128, ge=1, description="Sequences a forward pass.")
    examples: int = Field(12, ge=0, description="Examples shown in the report.")
    seed: int = Field(0, ge=0, description="Seed of shuffled controls.")
    candidates: tuple[Path, ...] = Field(
        (), description="Folders of prepared evaluation sets (SugarCrepe, MMEB, ...) whose questions are asked as well."
    )


class Gate(Section):
    """A condition on one metric that must hold before the alias moves."""

    metric: str = Field(description="Name in metrics.json.")
    at_least: float = Field(description="Smallest value that passes.")


class RegisterSettings(Section):
    """MLflow's model registry."""

    name: str = Field("fuselip-sample", pattern=r"^[A-Za-z0-9._-]+$", description="Registered model.")
    alias: str = Field("champion", pattern=r"^[a-z][a-z0-9_-]*$", description="Alias moved when every gate passes.")
    gates: tuple[Gate, ...] = Field((), description="All must pass, or the version is registered without the alias.")


class Settings(BaseModel):
    """One run, whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field("sample", description="Recipe that this run starts from.")
    artifacts: Path = Field(Path("artifacts"), description="Folder of every stage's output.")
    prepare: PrepareSettings = PrepareSettings()
    model: ModelSettings = ModelSettings()
    codebook: CodebookSettings = CodebookSettings()
    tokenize: TokenizeSettings = TokenizeSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    register_: RegisterSettings = Field(RegisterSettings(), alias="register")


SECTIONS = ("prepare", "model", "codebook", "tokenize", "train", "evaluate", "register")
_SECTION_FIELDS = {"register_" if name == "register" else name for name in SECTIONS}
# Keys of params.yaml that steer DVC's templates and are no settings of the run.
TEMPLATE_KEYS = ("settings", "repository")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_settings(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    artifacts: Path | None = None,
) -> Settings:
    """Recipe, corrected by the settings file at `path`, corrected by `overrides` such as ``train.steps=100``.

    `recipe` and `artifacts` replace the file's. Raises SettingsError naming the file, the field and what is allowed.
    """
    corrections = read_corrections(path) if path else {}
    name = str(recipe or corrections.get("recipe", "sample"))
    values = merge(read_recipe(name), merge(corrections, parse_overrides(overrides)))
    values["recipe"] = name
    if artifacts:
        values["artifacts"] = artifacts
    return check_settings(values, origin=str(path or f"recipe {name}"))


def read_corrections(path: Path) -> dict[str, Any]:
    """What a settings file such as params.yaml says about the run, without the keys that steer DVC's templates."""
    content = _read_yaml(path)
    return {key: {} if value is None else value for key, value in content.items() if key not in TEMPLATE_KEYS}


def check_settings(values: Mapping[str, Any], origin: str) -> Settings:
    """Settings from a nested mapping; raises SettingsError that lists every wrong field."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [_complaint(item) for item in error.errors(include_url=False)]
        raise SettingsError(f"{origin}: {'; '.join(lines)}") from error


def describe_settings(settings: Settings) -> str:
    """Every field with its value and, as a comment, its meaning: valid YAML."""
    lines = [f"recipe: {settings.recipe}"]
    for section, values in settings.model_dump(mode="json", by_alias=True, include=_SECTION_FIELDS).items():
        fields = _section_class(section).model_fields
        lines.append(f"{section}:")
        for name, value in values.items():
            text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            lines.append(f"  {name}: {text}  # {fields[name].description}")
    return "\n".join(lines)


def _complaint(item: ErrorDetails) -> str:
    place = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg']}, not {item['input']!r}"
    known = list(_section_class(str(item["loc"][0])).model_fields) if len(item["loc"]) > 1 else list(SECTIONS)
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    return f"{place}: there is no such field; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")


def _section_class(name: str) -> type[BaseModel]:
    field = Settings.model_fields["register_" if name == "register" else name].annotation
    assert isinstance(field, type) and issubclass(field, BaseModel)
    return field


def read_recipe(name: str) -> dict[str, Any]:
    """The nested mapping of a recipe; raises SettingsError for an unknown name."""
    path = RECIPE_FOLDER / f"{name}.yaml"
    if path.parent != RECIPE_FOLDER or not path.is_file():
        raise SettingsError(f"unknown recipe '{name}'; there are: {', '.join(recipe_names())}")
    return _read_yaml(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(f"no settings file at {path}; give another with --settings") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of sections")
    return content


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["train.steps=100"]`` → {"train": {"steps": 100}}; raises SettingsError for one that can't be read."""
    values: dict[str, Any] = {}
    for override in overrides:
        values = merge(values, _parse_override(override))
    return values


def _parse_override(text: str) -> dict[str, Any]:
    """``train.steps=100`` → {"train": {"steps": 100}}; the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise SettingsError(f"'{text}' is no override; write it as section.field=value, for example train.steps=100")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"the value of '{text}' is no valid YAML") from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return dict(nested)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; anything else in `top` replaces what is in `base`."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "mixture":
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged
