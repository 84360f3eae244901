"""Settings of a run: the sections of ``params.yaml``, and at the same time the parameters of the Prefect flows.

A run starts from a recipe (``fuselip_core/recipes/<name>.yaml``). A settings file (``params.yaml``) overrides the
recipe, and the command line overrides both. All values are checked here before a run starts.
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

# The pipeline, in order. Each name is a function in stages.py, a stage in dvc.yaml, a command and a settings section.
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
# Strict, so that `true` is not accepted as a number, nor "yes" as a switch.
Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Switch = Annotated[bool, Strict()]
Share = Annotated[float, Strict(), Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of all sections: unknown fields are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DicomSettings(Section):
    """Conversion of DICOM files to pictures and text."""

    text: Path | None = Field(None, description="CSV with a text column and a column that identifies images.")
    window: str = Field("file", description="CT window: the file's own, or a preset such as lung or bone.")
    frames: Int = Field(1, ge=1, description="Frames of a multi-frame file: 1 for the middle one, or this many.")
    keep_burned_in: Switch = Field(False, description="Keep files whose header declares burned-in text.")
    keep_derived: Switch = Field(False, description="Keep segmentations, dose maps and other derived objects.")
    ocr: Switch = Field(False, description="Search pictures for burned-in text (needs the extra `ocr`).")
    key_file: Path | None = Field(None, description="Key of the pseudonyms; default: the user's own.")
    valid_share: Number = Field(0.1, ge=0, lt=0.5, description="Share of the patients for validation.")
    test_share: Number = Field(0.1, ge=0, lt=0.5, description="Share of the patients for the test.")


class PrepareSettings(Section):
    """Raw data set → Parquet shards and a manifest."""

    source: SourceName = Field("phantom", description="Kind of data set in `root`.")
    root: Path = Field(Path("data"), description="Folder of the raw data set, relative to the repository.")
    rows_per_shard: Int = Field(2048, ge=1, description="Images in one Parquet shard.")
    workers: Int = Field(2, ge=1, le=256, description="Processes that check images.")
    min_caption_words: Int = Field(1, ge=0, description="Captions with fewer words are set aside.")
    extra_pairs: tuple[ExtraPairs, ...] = Field(
        (),
        description="Additional kinds of pairs: sentences (one of each caption), concepts (their names), questions (by "
        "rules), statements (questions joined with answers), and for training mirrored (all pairs mirrored, with left "
        "and right exchanged), edits (without flips) or general-edits (as published, with flips and colours).",
    )
    edited_share: Share = Field(1.0, description="Share of the training images that are edited.")
    limit: Int | None = Field(None, ge=1, description="Most images of a split; all if empty.")
    most_set_aside: Share = Field(
        0.05, description="Largest share of damaged or missing samples; prepare fails above it."
    )
    dev_share: Number = Field(
        0.0, ge=0.0, lt=1.0, description="Share of the training images held out as the split `dev`, by whole cases."
    )
    shared_images: Literal["drop", "drop-copies", "keep"] = Field(
        "drop",
        description="Training images that share the image, a copy or the case with a held-out split: drop all, drop "
        "the image and copies but not the case (as in published splits), or keep and count them.",
    )
    near_duplicates: Literal["drop", "keep"] = Field(
        "drop", description="Training images that look like a held-out one: drop them like copies, or do not search."
    )
    dicom: DicomSettings | None = Field(
        None, description="For the source `dicom`; default: dicom.yaml in its folder, if there is one."
    )
    seed: Int = Field(0, ge=0, description="Seed of splits and edits.")

    @model_validator(mode="after")
    def _images_are_made_one_way(self) -> PrepareSettings:
        made = [kind for kind in self.extra_pairs if kind in ("mirrored", "edits", "general-edits")]
        if len(made) > 1:
            raise ValueError(f"extra_pairs has both {' and '.join(made)}; leave one out (flips spoil left and right)")
        return self


class ModelSettings(Section):
    """The encoder; its dimensions are those of the size's preset."""

    family: Family = Field("fuselip", description="Early fusion, or one of the late-fusion baselines.")
    size: Size = Field("tiny", description="Preset of widths and depths.")
    context_length: Int | None = Field(None, ge=8, le=1024, description="Tokens of a sequence; the preset's if empty.")
    width: Int | None = Field(
        None, ge=8, description="Width of early fusion's tokens, all heads together; the preset's if empty."
    )
    mask_token: Switch = Field(True, description="Reserve a mask token (shifts all joint image ids by one).")


class CodebookSettings(Section):
    """The image tokenizer: trained from scratch, fine-tuned from a published one, or used unchanged."""

    init: str | None = Field(None, description="Folder or hub id of a tokenizer to start from; from scratch if empty.")
    image_size: Int | None = Field(
        None, ge=16, le=1024, description="Side of its input in pixels; the preset's if empty."
    )
    patch_size: Int | None = Field(None, ge=2, le=64, description="Side of a patch in pixels; the preset's if empty.")
    codes: Int | None = Field(None, ge=2, le=65536, description="Size of the codebook; the preset's if empty.")
    steps: Int = Field(600, ge=0, description="Optimiser steps; 0 uses the tokenizer of `init` unchanged.")
    batch_size: Int = Field(64, ge=1, description="Images per step.")
    learning_rate: Number = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: Number = Field(1e-4, ge=0, description="On matrices only.")
    warmup_share: Share = Field(0.05, description="Share of the steps over which the learning rate rises.")
    commitment_weight: Number = Field(0.25, ge=0, description="Pulls latents towards their code.")
    codebook_weight: Number = Field(1.0, ge=0, description="Pulls codes towards their latents.")
    gradient_weight: Number = Field(
        0.5, ge=0, description="Weight of L1 on image gradients, for sharp edges; 0 turns it off."
    )
    perceptual_weight: Number = Field(0.0, ge=0, description="Weight of the perceptual term; 0 turns it off.")
    perceptual_model: str | None = Field(
        None, description="Folder or hub id of a SigLIP baseline whose image features the perceptual term compares."
    )
    revive_every: Int = Field(50, ge=0, description="Steps between replacements of unused codes; 0: never.")
    seed: Int = Field(0, ge=0, description="Seed of weights, order and crops.")

    @model_validator(mode="after")
    def _dimensions_are_free(self) -> CodebookSettings:
        if self.init is not None and (self.image_size, self.patch_size, self.codes) != (None, None, None):
            raise ValueError("image_size, patch_size and codes are those of `init`; leave them or `init` empty")
        return self

    @model_validator(mode="after")
    def _perceptual_term_has_a_model(self) -> CodebookSettings:
        if self.perceptual_weight and not self.perceptual_model:
            raise ValueError("perceptual_weight is above 0, so perceptual_model must name a SigLIP checkpoint")
        return self


class TokenizeSettings(Section):
    """Images → codes."""

    views: Int = Field(1, ge=1, le=64, description="Views of an image: the evaluation view, then random crops.")
    crop_scale: tuple[float, float] = Field((0.8, 1.0), description="Area of a random crop, share of the image.")
    rotation: Number = Field(0.0, ge=0, le=180, description="Largest rotation of a random crop in degrees, either way.")
    contrast: Number = Field(
        0.0, ge=0, le=1, description="How much brightness and gamma of a random crop vary (0.2: 20 % either way)."
    )
    batch_size: Int = Field(64, ge=1, description="Images per forward pass.")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="Precision for random crops; the evaluation view is always tokenized in float32."
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
        False, description="Initialise the embeddings of image codes by a projection of the codebook, not randomly."
    )
    places_from_grid: Switch = Field(
        False, description="Initialise the positions of image codes by their places in the image, not randomly."
    )
    initial_embedding_std: Number = Field(0.02, gt=0, description="Initial standard deviation of token embeddings.")
    initial_scale: Number = Field(10.0, ge=1.0, le=100.0, description="Initial factor of similarities.")
    initial_bias: Number = Field(-10.0, le=0.0, description="Initial bias of scaled similarities.")
    steps: Int | None = Field(500, ge=1, description="Optimiser steps; or give epochs.")
    epochs: Number | None = Field(None, gt=0, description="Passes over the mixture's pairs; or give steps.")
    batch_size: Int = Field(128, ge=2, description="Pairs per step, over all processes.")
    processes: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Processes that torchrun starts on this machine; auto: one for each GPU."
    )
    accumulation: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Parts of a batch that a process computes one after the other, each against the whole batch, to "
        "save memory. auto: as few as fit into the free memory.",
    )
    contrast_rows: Int | None = Field(
        None, ge=1, description="Queries that are compared with all targets at a time; all if empty."
    )
    gradient_checkpointing: Switch = Field(
        False, description="Recompute blocks in the backward pass: far less memory, a third more computation."
    )
    compile: Switch = Field(
        False, description="Compile forward pass, losses and backward pass with torch.compile (needs a C++ compiler)."
    )
    cuda_graphs: Switch = Field(
        False,
        description="On CUDA: copy batches ahead on a separate stream and, with compile, replay CUDA graphs. "
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
    mask_probability: Share = Field(0.1, description="Share of tokens masked for masked multimodal modelling.")
    mask_weight: Number = Field(0.25, ge=0, description="Weight of the masked-token loss; 0 turns it off.")
    all_combinations: Switch = Field(
        False, description="Use queries as negatives of queries, and targets of targets (a published option)."
    )
    targets_apart: Switch = Field(
        False,
        description="Targets are also each other's negatives: keeps texts that differ in one word, such as left and "
        "right, from becoming one vector.",
    )
    alike_pairs: Literal["negatives", "ignored"] = Field(
        "negatives", description="Whether pairs of the same image, or with the same concepts, are negatives."
    )
    equal_targets: Literal["each", "once"] = Field(
        "each",
        description="Whether a target shared by several pairs of a batch, such as the answer yes, is a negative each "
        "time or once; once keeps frequent answers from being suppressed.",
    )
    mixture: dict[str, float] = Field(
        {"caption": 1.0},
        description="Weight of each kind of pair (caption, vqa, ...; name:kind for a store named in `tokens`).",
    )
    mixture_by: Literal["share", "passes"] = Field(
        "share", description="Weights are shares of a batch, or passes over the kind in an epoch (0.5: half of it)."
    )
    tokens: dict[str, Path] = Field(
        {}, description="Further token stores by name, with the same codebook, such as general pairs to replay."
    )
    grouped: Switch = Field(False, description="Keep the pairs of a group together in a batch, as hard negatives.")
    ema: Number = Field(
        0.0,
        ge=0,
        lt=1,
        description="EMA decay per step. The averaged weights are measured and saved; 0 turns averaging off.",
    )
    interpolate: Share = Field(
        1.0, description="Interpolation between initial (0) and trained (1) weights in the saved model."
    )
    preflight: Switch = Field(True, description="Check schedule, first loss and gradients before the first step.")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on CUDA.")
    validate_every: Int = Field(100, ge=1, description="Steps between validations.")
    checkpoint_every: Int = Field(100, ge=1, description="Steps between checkpoints.")
    checkpoint_minutes: Number = Field(10.0, gt=0, description="Minutes between checkpoints, whichever comes first.")
    keep_checkpoints: Int = Field(2, ge=1, description="Checkpoints kept on disk.")
    seed: Int = Field(0, ge=0, description="Seed of weights, order and masks.")

    @model_validator(mode="after")
    def _mixture_has_weight(self) -> TrainSettings:
        if not self.mixture or min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0:
            raise ValueError("mixture needs at least one positive weight and no negative one")
        named = {kind.split(":")[0] for kind in self.mixture if ":" in kind}
        if unknown := sorted(named - set(self.tokens)):
            raise ValueError(f"mixture names {', '.join(unknown)}, but `tokens` gives no folder for it; add one")
        return self

    @model_validator(mode="after")
    def _length_is_said_once(self) -> TrainSettings:
        for names in (("steps", "epochs"), ("warmup_steps", "warmup_share")):
            if sum(getattr(self, name) is not None for name in names) != 1:
                raise ValueError(f"give either {names[0]} or {names[1]}, and null for the other")
        if self.warmup_steps is not None and self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} is not below the run's {self.steps} steps; give a warmup_share, or "
                "more steps"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainSettings:
        if self.accumulation != "auto" and self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        if self.interpolate < 1 and self.init is None:
            raise ValueError("interpolate below 1 needs the weights of `init`, which is empty; name a checkpoint")
        return self


class EvaluateSettings(Section):
    """Evaluation on a held-out split."""

    split: Literal["dev", "valid", "test"] = Field("test", description="Split to evaluate; dev for choosing settings.")
    batch_size: Int = Field(128, ge=1, description="Sequences per forward pass.")
    examples: Int = Field(12, ge=0, description="Examples in the report.")
    seed: Int = Field(0, ge=0, description="Seed of shuffled controls.")
    candidates: tuple[Path, ...] = Field(
        (), description="Folders of prepared evaluation sets (SugarCrepe, MMEB, ...) to evaluate as well."
    )
    transformations: tuple[Literal["crop", "rotate", "light", "colour", "flip", "colorize"], ...] = Field(
        (), description="Families of image transformations for transformation retrieval on held-out images."
    )
    classes: dict[str, str] = Field(
        {}, description="Concept → caption of a class, for zero-shot classification of images with the concept."
    )
    retention: Path | None = Field(
        None, description="Artifacts of a run on general data, to measure what fine-tuning has forgotten of train.init."
    )


class Gate(Section):
    """A condition on a metric that must hold for the alias to move."""

    metric: str = Field(description="Name in metrics.json.")
    at_least: Number = Field(description="Smallest value that passes.")

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The lower bound of the metric's interval, or the metric if it has none; None if it is missing."""
        return metrics.get(f"{self.metric}/low", metrics.get(self.metric))


class RegisterSettings(Section):
    """MLflow's model registry."""

    name: str = Field(
        "fuselip-sample",
        pattern=r"^[A-Za-z0-9._-]+$",
        description="Name of the registered model, without the size, which is appended.",
    )
    alias: str = Field("champion", pattern=r"^[a-z][a-z0-9_-]*$", description="Alias that moves if all gates pass.")
    gates: tuple[Gate, ...] = Field(
        (), description="Conditions for the alias; a version that fails one is registered without it."
    )
    against_champion: bool = Field(
        True,
        description="Also require that no gate's metric is significantly below that of the version with the alias, on "
        "the same data version.",
    )


class MonitorSettings(Section):
    """Alarms for differences between a model's inputs and its training data. No stage reads this."""

    rows: Int = Field(1000, ge=50, description="Number of training images, and of seen ones, to compare.")
    domain_auc: Share = Field(0.7, description="AUC of a classifier that separates seen from training rows.")
    unfamiliar_share: Share = Field(
        0.25, description="Share of seen rows whose best hit scores below that of 95 % of the training rows."
    )
    modality_distance: Share = Field(0.2, description="Total variation distance between the shares of modalities.")
    length_distance: Share = Field(0.3, description="Kolmogorov-Smirnov distance between the lengths of texts.")
    brightness_distance: Share = Field(
        0.3, description="Kolmogorov-Smirnov distance between the brightness of pictures."
    )
    unreadable_share: Share = Field(0.05, description="Share of unreadable seen rows.")


class Settings(BaseModel):
    """All settings of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field("sample", description="Recipe of the run.")
    artifacts: Path = Field(Path("artifacts"), description="Folder of all stages' outputs.")
    prepare: PrepareSettings = PrepareSettings()
    model: ModelSettings = ModelSettings()
    codebook: CodebookSettings = CodebookSettings()
    tokenize: TokenizeSettings = TokenizeSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    register_: RegisterSettings = Field(RegisterSettings(), alias="register")
    monitor: MonitorSettings = MonitorSettings()


# Names of runs, which become folders.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_SECTION_FIELDS = {"register_" if name == "register" else name for name in SECTIONS} | {"monitor"}


def check_run_name(name: str) -> None:
    """Raises SettingsError for a name that is not valid as a folder."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise SettingsError(f"'{name}' can't name a run; use the letters a-z, digits, dots, dashes and underscores")


def load_settings(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    artifacts: Path | None = None,
    size: str | None = None,
) -> Settings:
    """The recipe, overridden by the settings file at `path`, overridden by `overrides` such as ``train.steps=100``.

    `recipe`, `artifacts` and `size` override the file. Raises SettingsError with the file, the field and the allowed
    values.
    """
    values = _merged(layers_of(path, overrides, recipe, size))
    if artifacts:
        values["artifacts"] = artifacts
    origin = str(path or f"recipe {values['recipe']}")
    return check_settings(values, origin=f"{origin} and --set" if overrides else origin)


def layers_of(
    path: Path | None = None, overrides: Sequence[str] = (), recipe: str | None = None, size: str | None = None
) -> list[Layer]:
    """All sources of a run's settings, in order of increasing priority; see load_settings."""
    given = [
        Layer(str(path), read_corrections(path) if path else {}),
        Layer("--recipe", {"recipe": recipe} if recipe else {}),
        Layer("--set", parse_overrides(overrides)),
        Layer("--size", {"model": {"size": size}} if size else {}),
    ]
    return [*_recipe_layers(_merged(given)), *given]


def corrected_recipe(corrections: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of the recipe and size in `corrections`, with the corrections applied, not validated."""
    return _merged([*_recipe_layers(corrections), Layer("", corrections)])


def _recipe_layers(corrections: Mapping[str, Any]) -> list[Layer]:
    """Defaults, base and recipe for the recipe and size in `corrections`."""
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
    """Settings from a nested mapping; raises SettingsError with all invalid fields."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [_complaint(item) for item in error.errors(include_url=False)]
        raise SettingsError(f"{origin}: {'; '.join(lines)}") from error


def describe_settings(settings: Settings, layers: Sequence[Layer] = ()) -> str:
    """All fields as YAML, with their description and, given `layers`, the source of their value as comments."""
    lines = [f"recipe: {settings.recipe}", f"artifacts: {settings.artifacts}"]
    for section, values in settings.model_dump(mode="json", by_alias=True, include=_SECTION_FIELDS).items():
        fields = _section_class(section).model_fields
        lines.append(f"{section}:")
        for name, value in values.items():
            origin = f"[{_origin(layers, section, name)}] " if layers else ""
            lines.append(f"  {name}: {as_yaml(value)}  # {origin}{fields[name].description}")
    return "\n".join(lines)


def _origin(layers: Sequence[Layer], section: str, name: str) -> str:
    """The last source that sets the field, directly or by setting its alternative (steps for epochs)."""
    origin, before = "", None
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
        value = values.get(section, {}).get(name)
        if name in (layer.values.get(section) or {}) or value != before:
            origin, before = layer.origin, value
    return origin


def differences(first: Settings, second: Settings) -> dict[str, tuple[str, str]]:
    """Fields (section.field) in which two runs differ, with both values as YAML, except the recipes' names."""
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
    if item["type"] == "value_error":  # from a validator of a section
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
