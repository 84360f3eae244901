"""Settings of a run: the sections of ``params.yaml``, and at the same time the parameters of the Prefect flows.

A run is described by a recipe (``fuselip_core/recipes/<name>.yaml``), corrected by a settings file (``params.yaml``)
and, last, by single overrides from the command line. Every value is checked here, before anything runs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fuselip_core.recipes.read import (
    RECIPE_FOLDER,
    Layer,
    SettingsError,
    merge,
    parse_overrides,
    read_corrections,
    recipe_layers,
    recipe_names,
    recipe_title,
)

__all__ = [
    "RECIPE_FOLDER",
    "SECTIONS",
    "STAGES",
    "Settings",
    "SettingsError",
    "as_yaml",
    "check_run_name",
    "check_settings",
    "corrected_recipe",
    "describe_settings",
    "differences",
    "layers_of",
    "load_settings",
    "merge",
    "parse_overrides",
    "read_corrections",
    "recipe_names",
    "recipe_title",
]

# The pipeline, in order. Each name is a function in stages.py, a stage in dvc.yaml, a verb and a section of settings.
STAGES = ("prepare", "codebook", "tokenize", "train", "evaluate", "register")
SECTIONS = ("prepare", "model", *STAGES[1:])

Size = Literal["tiny", "small", "base", "large"]
Family = Literal["fuselip", "siglip-sf", "siglip-mlf"]
ExtraPairs = Literal["sentences", "concepts", "questions", "statements", "mirrored", "edits", "general-edits"]
SourceName = Literal[
    "phantom",
    "rocov2",
    "folder",
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
# Strict: `true` is no number of steps, and "yes" is no switch.
Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Switch = Annotated[bool, Strict()]
Share = Annotated[float, Strict(), Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of all sections: unknown names are errors, values are fixed after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DicomSettings(Section):
    """How a DICOM folder becomes pictures and text."""

    text: Path | None = Field(None, description="CSV with a text column and a column that names images.")
    window: str = Field("file", description="CT window: the file's own, or a preset such as lung or bone.")
    frames: Int = Field(1, ge=1, description="Frames of a multi-frame file: the middle one, or so many.")
    keep_burned_in: Switch = Field(False, description="Take files that say they carry burned-in text.")
    keep_derived: Switch = Field(False, description="Take segmentations, dose maps and the like.")
    ocr: Switch = Field(False, description="Look for burned-in text in the pictures (needs the extra `ocr`).")
    key_file: Path | None = Field(None, description="Key of the pseudonyms; the user's own if empty.")
    valid_share: Number = Field(0.1, ge=0, lt=0.5, description="Share of the patients kept for validation.")
    test_share: Number = Field(0.1, ge=0, lt=0.5, description="Share of the patients kept for the test.")


class PrepareSettings(Section):
    """Raw data set → Parquet shards and a manifest."""

    source: SourceName = Field("phantom", description="Kind of data set found under `root`.")
    root: Path = Field(Path("data"), description="Folder of the raw data set, relative to the repository.")
    rows_per_shard: Int = Field(2048, ge=1, description="Images in one Parquet shard.")
    workers: Int = Field(2, ge=1, le=256, description="Processes that check images.")
    min_caption_words: Int = Field(1, ge=0, description="Captions with fewer words are set aside.")
    extra_pairs: tuple[ExtraPairs, ...] = Field(
        (),
        description="Kinds of pairs made of an image beside the published ones: one sentence of its caption, the names "
        "of its concepts, questions that rules ask about them, its questions with their answers as texts that describe "
        "it, and for training all pairs of the mirrored image with left and right exchanged in their texts, or edits: "
        "such as keep left and right, or the published ones with flips and colours.",
    )
    edited_share: Share = Field(1.0, description="Share of the training images that edits are made of.")
    limit: Int | None = Field(None, ge=1, description="At most this many images a split; all if empty.")
    most_set_aside: Share = Field(
        0.05, description="Share of samples that may be lost to damage or missing files; above it, prepare stops."
    )
    dev_share: Number = Field(
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
    seed: Int = Field(0, ge=0, description="Seed of every random choice made while splitting.")

    @model_validator(mode="after")
    def _images_are_made_one_way(self) -> PrepareSettings:
        made = [kind for kind in self.extra_pairs if kind in ("mirrored", "edits", "general-edits")]
        if len(made) > 1:
            raise ValueError(f"extra_pairs has both {' and '.join(made)}; leave one out (flips spoil left and right)")
        return self


class ModelSettings(Section):
    """Which encoder is trained; dimensions come from the size's preset unless given here."""

    family: Family = Field("fuselip", description="Early fusion, or one of the late-fusion baselines.")
    size: Size = Field("tiny", description="Preset of widths and depths.")
    context_length: Int | None = Field(None, ge=8, le=1024, description="Tokens a sequence; the preset's if empty.")
    width: Int | None = Field(
        None, ge=8, description="Width of early fusion's tokens, all heads together; the preset's if empty."
    )
    mask_token: Switch = Field(True, description="Reserve a mask token (moves every joint image id by one).")


class CodebookSettings(Section):
    """The image tokenizer: trained from scratch, fine-tuned from a published one, or taken as it is."""

    init: str | None = Field(None, description="Folder or hub id of a tokenizer to start from; from scratch if empty.")
    image_size: Int | None = Field(None, ge=16, le=1024, description="Pixels a side it reads; the preset's if empty.")
    patch_size: Int | None = Field(None, ge=2, le=64, description="Pixels a side of a patch; the preset's if empty.")
    codes: Int | None = Field(None, ge=2, le=65536, description="Size of the codebook; the preset's if empty.")
    steps: Int = Field(600, ge=0, description="Optimiser steps; 0 takes the tokenizer of `init` as it is.")
    batch_size: Int = Field(64, ge=1, description="Images a step.")
    learning_rate: Number = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: Number = Field(1e-4, ge=0, description="On matrices only.")
    warmup_share: Share = Field(0.05, description="Share of the steps over which the learning rate rises.")
    commitment_weight: Number = Field(0.25, ge=0, description="Pulls latents towards their code.")
    codebook_weight: Number = Field(1.0, ge=0, description="Pulls codes towards their latents.")
    gradient_weight: Number = Field(0.5, ge=0, description="L1 on image gradients, keeps edges sharp; 0 turns it off.")
    perceptual_weight: Number = Field(0.0, ge=0, description="Weight of the perceptual term; 0 turns it off.")
    perceptual_model: str | None = Field(
        None, description="Folder or hub id of a SigLIP baseline whose image features the perceptual term compares."
    )
    revive_every: Int = Field(50, ge=0, description="Steps between replacements of unused codes; 0 never.")
    seed: Int = Field(0, ge=0, description="Seed of weights, order and crops.")

    @model_validator(mode="after")
    def _dimensions_are_free(self) -> CodebookSettings:
        if self.init is not None and (self.image_size, self.patch_size, self.codes) != (None, None, None):
            raise ValueError("image_size, patch_size and codes are those of `init`; leave them empty, or init")
        return self

    @model_validator(mode="after")
    def _perceptual_term_has_a_model(self) -> CodebookSettings:
        if self.perceptual_weight and not self.perceptual_model:
            raise ValueError("perceptual_weight is above 0, so perceptual_model must name a SigLIP checkpoint")
        return self


class TokenizeSettings(Section):
    """Images → codes, once."""

    views: Int = Field(1, ge=1, le=64, description="Views an image: the evaluation view, then random crops.")
    crop_scale: tuple[float, float] = Field((0.8, 1.0), description="Area of a random crop, share of the image.")
    rotation: Number = Field(0.0, ge=0, le=180, description="Degrees a random crop is turned at most, either way.")
    contrast: Number = Field(
        0.0, ge=0, le=1, description="By how much brightness and gamma of a random crop vary (0.2: 20 % either way)."
    )
    batch_size: Int = Field(64, ge=1, description="Images a forward pass.")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="Of the image tokenizer, for random crops; the evaluation view is always in float32."
    )
    crops: Literal["auto", "pillow", "device"] = Field(
        "auto", description="Who cuts and resizes random crops: Pillow, or the tokenizer's device; auto: a GPU does."
    )
    rows_per_shard: Int = Field(4096, ge=1, description="Images tokenized between two points of resumption.")
    seed: Int = Field(0, ge=0, description="Seed of the random crops.")

    @model_validator(mode="after")
    def _only_pillow_varies(self) -> TokenizeSettings:
        if self.crops == "device" and (self.rotation or self.contrast):
            raise ValueError("crops are turned and varied in contrast by Pillow; set crops to auto or pillow")
        return self


class TrainSettings(Section):
    """The joint encoder's training."""

    init: str | None = Field(None, description="Folder or hub id of a checkpoint to start from; random if empty.")
    codes_from_codebook: Switch = Field(
        False, description="Begin the embeddings of image codes as a projection of the codebook, not as noise."
    )
    places_from_grid: Switch = Field(
        False, description="Begin the positions of image codes as features of their places in the image, not as noise."
    )
    initial_embedding_std: Number = Field(0.02, gt=0, description="Spread of token embeddings at the start.")
    initial_scale: Number = Field(10.0, ge=1.0, le=100.0, description="Factor of similarities at the start.")
    initial_bias: Number = Field(-10.0, le=0.0, description="What is added to scaled similarities at the start.")
    steps: Int | None = Field(500, ge=1, description="Optimiser steps; or give epochs.")
    epochs: Number | None = Field(None, gt=0, description="Length in passes over the mixture's pairs; or give steps.")
    batch_size: Int = Field(128, ge=2, description="Pairs a step, of all processes together.")
    processes: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Processes that torchrun starts on this machine; auto: one for each GPU."
    )
    accumulation: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Parts a process computes its pairs in, each against all of the batch: less memory. auto: as few "
        "as fit into the free memory.",
    )
    contrast_rows: Int | None = Field(
        None, ge=1, description="Queries compared with all targets at a time, for large batches; all if empty."
    )
    gradient_checkpointing: Switch = Field(
        False, description="Compute each block again in the backward pass: far less memory, a third more work."
    )
    compile: Switch = Field(
        False, description="Compile forward pass, losses and backward pass with torch.compile (needs a C++ compiler)."
    )
    cuda_graphs: Switch = Field(
        False,
        description="On CUDA: copy batches ahead on a stream of their own and, with compile, replay CUDA graphs. "
        "Not measured yet.",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="AdamW (published), or Muon for the matrices of the blocks and AdamW for all else."
    )
    learning_rate: Number = Field(1e-3, gt=0, description="Peak learning rate.")
    weight_decay: Number = Field(0.2, ge=0, description="On matrices only.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's decay of first and second moments.")
    epsilon: Number = Field(1e-8, gt=0, description="Added to AdamW's denominator.")
    warmup_share: Share | None = Field(
        0.1, description="Share of the steps over which the learning rate rises; or give warmup_steps."
    )
    warmup_steps: Int | None = Field(
        None, ge=0, description="Steps over which the learning rate rises; or give warmup_share."
    )
    clip_norm: Number = Field(1.0, gt=0, description="Largest gradient norm.")
    mask_probability: Share = Field(0.1, description="Share of tokens hidden for masked multimodal modelling.")
    mask_weight: Number = Field(0.25, ge=0, description="Weight of the masked-token loss; 0 turns it off.")
    all_combinations: Switch = Field(
        False, description="Queries are also each other's negatives, and so are targets (a published option)."
    )
    targets_apart: Switch = Field(
        False,
        description="Targets are also each other's negatives: keeps texts that differ in one word, such as left and "
        "right, from becoming one vector.",
    )
    alike_pairs: Literal["negatives", "ignored"] = Field(
        "negatives", description="Pairs of the same image, or of images with the same concepts, as negatives or not."
    )
    equal_targets: Literal["each", "once"] = Field(
        "each",
        description="A target that several pairs of a batch share, such as the answer yes, is a negative of the others "
        "each time, or once, so that frequent answers are not pushed down.",
    )
    mixture: dict[str, float] = Field(
        {"caption": 1.0},
        description="Weight of each kind of pair (caption, vqa, ...; name:kind for a store named in `tokens`).",
    )
    mixture_by: Literal["share", "passes"] = Field(
        "share", description="Weights are shares of a batch, or how often an epoch passes over the kind (0.5: half)."
    )
    tokens: dict[str, Path] = Field(
        {}, description="Further token stores by name, made with the same codebook: general pairs to replay, say."
    )
    grouped: Switch = Field(False, description="Keep variants of one image together in a batch, as hard negatives.")
    ema: Number = Field(
        0.0,
        ge=0,
        lt=1,
        description="EMA decay per step. The averaged weights are measured and saved; 0 turns averaging off.",
    )
    interpolate: Share = Field(
        1.0, description="Share of the trained weights in the saved model; the rest are those it started from."
    )
    preflight: Switch = Field(True, description="Check schedule, first loss and gradients before the first step.")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on CUDA.")
    validate_every: Int = Field(100, ge=1, description="Steps between looks at the validation split.")
    checkpoint_every: Int = Field(100, ge=1, description="Steps between checkpoints.")
    checkpoint_minutes: Number = Field(10.0, gt=0, description="Minutes between checkpoints, whichever is first.")
    keep_checkpoints: Int = Field(2, ge=1, description="Checkpoints kept on disk.")
    seed: Int = Field(0, ge=0, description="Seed of weights, order and masks.")

    @model_validator(mode="after")
    def _mixture_has_weight(self) -> TrainSettings:
        if not self.mixture or min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0:
            raise ValueError("mixture needs at least one kind with a positive weight and none below zero")
        named = {kind.split(":")[0] for kind in self.mixture if ":" in kind}
        if unknown := sorted(named - set(self.tokens)):
            raise ValueError(f"mixture names {', '.join(unknown)}, which `tokens` has no folder for; add it")
        return self

    @model_validator(mode="after")
    def _length_is_said_once(self) -> TrainSettings:
        for names in (("steps", "epochs"), ("warmup_steps", "warmup_share")):
            if sum(getattr(self, name) is not None for name in names) != 1:
                raise ValueError(f"give either {names[0]} or {names[1]}, and null for the other")
        if self.warmup_steps is not None and self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} does not end within the run's {self.steps} steps; "
                "give a warmup_share, or more steps"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainSettings:
        if self.accumulation != "auto" and self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")
        if self.interpolate < 1 and self.init is None:
            raise ValueError("interpolate below 1 mixes in the weights of `init`, which is empty; name a checkpoint")
        return self


class EvaluateSettings(Section):
    """Measures on a held-out split."""

    split: Literal["dev", "valid", "test"] = Field("test", description="Split that is measured; dev for choices.")
    batch_size: Int = Field(128, ge=1, description="Sequences a forward pass.")
    examples: Int = Field(12, ge=0, description="Examples shown in the report.")
    seed: Int = Field(0, ge=0, description="Seed of shuffled controls.")
    candidates: tuple[Path, ...] = Field(
        (), description="Folders of prepared evaluation sets (SugarCrepe, MMEB, ...) whose questions are asked as well."
    )
    transformations: tuple[Literal["crop", "rotate", "light", "colour", "flip", "colorize"], ...] = Field(
        (), description="Families of image transformations whose variants of a held-out image are to be told apart."
    )
    classes: dict[str, str] = Field(
        {}, description="Concept → caption of a class: images that have one of the concepts are to find its caption."
    )
    retention: Path | None = Field(
        None, description="Artifacts of a run on general data: what the adaptation keeps of train.init's ability there."
    )


class Gate(Section):
    """A condition on one metric that must hold before the alias moves."""

    metric: str = Field(description="Name in metrics.json.")
    at_least: Number = Field(description="Smallest value that passes.")

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The metric, or the lower bound of its interval over cases where it has one; None where it is missing."""
        return metrics.get(f"{self.metric}/low", metrics.get(self.metric))


class RegisterSettings(Section):
    """MLflow's model registry."""

    name: str = Field(
        "fuselip-sample", pattern=r"^[A-Za-z0-9._-]+$", description="Registered model, without the size, which follows."
    )
    alias: str = Field("champion", pattern=r"^[a-z][a-z0-9_-]*$", description="Alias moved when every gate passes.")
    gates: tuple[Gate, ...] = Field((), description="All must pass, or the version is registered without the alias.")
    against_champion: bool = Field(
        True,
        description="No gate's metric may be below that of the version with the alias by more than their intervals "
        "allow, on the same data version.",
    )


class MonitorSettings(Section):
    """When what a model sees differs too much from its training data. No stage reads this."""

    rows: Int = Field(1000, ge=50, description="Images of the training data, and of what was seen, that are compared.")
    domain_auc: Share = Field(0.7, description="AUC of a classifier that tells seen from training rows.")
    unfamiliar_share: Share = Field(
        0.25, description="Share of seen rows whose best hit is worse than that of 95 % of the training rows."
    )
    modality_distance: Share = Field(0.2, description="Distance between the mixes of modalities (total variation).")
    length_distance: Share = Field(0.3, description="Distance between the lengths of texts (Kolmogorov-Smirnov).")
    brightness_distance: Share = Field(0.3, description="The same of the brightness of pictures.")
    unreadable_share: Share = Field(0.05, description="Share of seen rows that could not be used.")


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
    monitor: MonitorSettings = MonitorSettings()


# What a run may be called: it becomes a folder's name.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_SECTION_FIELDS = {"register_" if name == "register" else name for name in SECTIONS} | {"monitor"}


def check_run_name(name: str) -> None:
    """Raises SettingsError for a name that is not one folder's."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise SettingsError(f"'{name}' can't name a run; use the letters a-z, digits, dots, dashes and underscores")


def load_settings(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    artifacts: Path | None = None,
    size: str | None = None,
) -> Settings:
    """Recipe, corrected by the settings file at `path`, corrected by `overrides` such as ``train.steps=100``.

    `recipe`, `artifacts` and `size` replace the file's. Raises SettingsError naming the file, the field and what is
    allowed.
    """
    values = _merged(layers_of(path, overrides, recipe, size))
    if artifacts:
        values["artifacts"] = artifacts
    origin = str(path or f"recipe {values['recipe']}")
    return check_settings(values, origin=f"{origin} and --set" if overrides else origin)


def layers_of(
    path: Path | None = None, overrides: Sequence[str] = (), recipe: str | None = None, size: str | None = None
) -> list[Layer]:
    """All sources of a run's settings, the weakest first; see load_settings."""
    given = [
        Layer(str(path), read_corrections(path) if path else {}),
        Layer("--recipe", {"recipe": recipe} if recipe else {}),
        Layer("--set", parse_overrides(overrides)),
        Layer("--size", {"model": {"size": size}} if size else {}),
    ]
    return [*_recipe_layers(_merged(given)), *given]


def corrected_recipe(corrections: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that `corrections` name, at the size they name, with all of them made: every field, not checked."""
    return _merged([*_recipe_layers(corrections), Layer("", corrections)])


def _recipe_layers(corrections: Mapping[str, Any]) -> list[Layer]:
    """Defaults, base and recipe, of the recipe and size that `corrections` name."""
    model = corrections.get("model")
    size = model.get("size") if isinstance(model, Mapping) else None
    defaults = Settings().model_dump(mode="json", by_alias=True)
    return [Layer("default", defaults), *recipe_layers(str(corrections.get("recipe", defaults["recipe"])), size)]


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
    return values


def check_settings(values: Mapping[str, Any], origin: str) -> Settings:
    """Settings from a nested mapping; raises SettingsError that lists every wrong field."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [_complaint(item) for item in error.errors(include_url=False)]
        raise SettingsError(f"{origin}: {'; '.join(lines)}") from error


def describe_settings(settings: Settings, layers: Sequence[Layer] = ()) -> str:
    """Every field with its value and, as a comment, its meaning and where the value comes from: valid YAML."""
    lines = [f"recipe: {settings.recipe}", f"artifacts: {settings.artifacts}"]
    for section, values in settings.model_dump(mode="json", by_alias=True, include=_SECTION_FIELDS).items():
        fields = _section_class(section).model_fields
        lines.append(f"{section}:")
        for name, value in values.items():
            origin = f"[{_origin(layers, section, name)}] " if layers else ""
            lines.append(f"  {name}: {as_yaml(value)}  # {origin}{fields[name].description}")
    return "\n".join(lines)


def _origin(layers: Sequence[Layer], section: str, name: str) -> str:
    """The last source that states the field, or that changes it by stating its alternative (steps for epochs)."""
    origin, before = "", None
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
        value = values.get(section, {}).get(name)
        if name in (layer.values.get(section) or {}) or value != before:
            origin, before = layer.origin, value
    return origin


def differences(first: Settings, second: Settings) -> dict[str, tuple[str, str]]:
    """Fields, named section.field, in which two runs differ, with both values as YAML; their recipes' names aside."""
    pages = [settings.model_dump(mode="json", by_alias=True, include=_SECTION_FIELDS) for settings in (first, second)]
    return {
        f"{section}.{name}": (as_yaml(value), as_yaml(pages[1][section][name]))
        for section, values in pages[0].items()
        for name, value in values.items()
        if value != pages[1][section][name]
    }


def as_yaml(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _complaint(item: ErrorDetails) -> str:
    place = ".".join(map(str, item["loc"]))
    if item["type"] == "value_error":  # said by a section about several of its fields
        return f"{place}: {item['msg'].removeprefix('Value error, ')}"
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg']}, not {item['input']!r}"
    known = list(_section_class(str(item["loc"][0])).model_fields) if len(item["loc"]) > 1 else list(SECTIONS)
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    return f"{place}: there is no such field; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")


def _section_class(name: str) -> type[BaseModel]:
    field = Settings.model_fields["register_" if name == "register" else name].annotation
    assert isinstance(field, type) and issubclass(field, BaseModel)
    return field
