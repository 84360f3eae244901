"""What compare_families.py runs: data sets, families, ablations and adaptations, each with three seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from measure import SHARED

SEEDS = (0, 1, 2)
FAMILIES = {"fuselip": "early fusion", "siglip-sf": "SigLIP-SF", "siglip-mlf": "SigLIP-MLF"}

# What is the same for all: the recipe `sample`, smaller batches, whole groups in a batch, edits among the pairs.
COMMON: dict[str, Any] = {
    "prepare": {"extra_pairs": ["edits"]},
    "tokenize": {"views": 2},
    "train": {"batch_size": 64, "grouped": True, "preflight": False, "validate_every": 100000},
    "evaluate": {"examples": 0, "transformations": ["crop", "rotate", "light"]},
}
DATA: dict[str, dict[str, Any]] = {
    "sample": {
        "prepare": {"source": "phantom", "limit": 2000},
        "train": {"mixture": {"caption": 0.4, "vqa": 0.4, "edit": 0.2}},
        "evaluate": {"split": "test"},
    },
    "medpix": {
        "prepare": {
            "source": "rocov2",
            "root": SHARED / "medpix-rocov2",
            "extra_pairs": ["sentences", "concepts", "questions", "edits"],
            "dev_share": 0.05,
        },
        "train": {"mixture": {"caption": 0.3, "sentence": 0.1, "concepts": 0.2, "vqa": 0.2, "edit": 0.2}},
        "evaluate": {"split": "valid"},
    },
    "vqa-rad": {
        "prepare": {"source": "vqa-rad", "root": SHARED / "vqa-rad", "dev_share": 0.1},
        "train": {"mixture": {"vqa": 0.8, "edit": 0.2}},
        "evaluate": {"split": "test"},
    },
}
# Codes in which tumours stay visible, and the settings that the recipe had when the families were tuned and measured.
DATA["brain-mri"] = {
    "recipe": "brain-mri",
    "prepare": {
        "source": "rocov2",
        "root": SHARED / "brain-mri-rocov2",
        "extra_pairs": ["sentences", "concepts", "statements", "mirrored"],
    },
    "tokenize": {"views": 4, "crop_scale": [0.9, 1.0], "rotation": 0.0, "contrast": 0.0},
    "train": {
        "mixture": {"caption": 0.2, "vqa": 0.8},
        "grouped": False,
        "optimizer": "adamw",
        "ema": 0.0,
        "targets_apart": False,
    },
    "evaluate": {"split": "test", "transformations": []},
}
TRIED_ON = {
    "sample": "valid",
    "medpix": "dev",
    "vqa-rad": "dev",
    "brain-mri": "valid",
}  # settings are chosen by these: never by a test split
# Chosen by trials of the sample, README.md in this folder tells which; the joint encoder keeps what the recipe has.
TUNED: dict[str, dict[str, Any]] = {
    "fuselip": {},
    "siglip-sf": {"learning_rate": 0.001, "initial_scale": 10.0, "initial_bias": -10.0},
    "siglip-mlf": {"learning_rate": 0.0005, "initial_scale": 10.0, "initial_bias": -10.0},
}
# Chosen by trials of brain MRI, on its split valid.
TUNED_ON_BRAIN: dict[str, dict[str, Any]] = {
    "fuselip": {"learning_rate": 0.002},
    "siglip-sf": {**TUNED["siglip-sf"], "learning_rate": 0.0005},
    "siglip-mlf": {**TUNED["siglip-mlf"], "learning_rate": 0.001},
}
# MedPix once more, in the codes of the sample's image tokenizer, which an adaptation of the sample's model reads.
DATA["adapted"] = DATA["medpix"]
# And in the codes of that image tokenizer fine-tuned on MedPix: what its adaptation does to retrieval.
DATA["retuned"] = DATA["medpix"]
CODES = {
    "adapted": "the sample's",
    "retuned": "the sample's, fine-tuned on MedPix",
    "medpix": "trained on MedPix alone",
}
FROM_SCRATCH = "scratch"  # label of an early-fusion model trained from nothing on "adapted" or "retuned"
GUARDED: dict[str, Any] = {
    "learning_rate": 0.0005,
    "ema": 0.98,
    "interpolate": 0.8,
    "alike_pairs": "ignored",
    "mixture": {**DATA["medpix"]["train"]["mixture"], "sample:caption": 0.15, "sample:vqa": 0.15},
}
UNGUARDED: dict[str, Any] = {
    "learning_rate": 0.002,
    "ema": 0.0,
    "interpolate": 1.0,
    "alike_pairs": "negatives",
    "mixture": DATA["medpix"]["train"]["mixture"],
}
# Name → title, and what is different from the run beside it.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "unmasked": ("without masked modelling", {"mask_weight": 0.0}),
    "ungrouped": ("without grouped negatives", {"grouped": False}),
}
ADAPTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "guarded": ("all guards", {}),
    "unguarded": ("none of them", UNGUARDED),
    "fast": ("peak learning rate 0.002 instead of 0.0005", {"learning_rate": 0.002}),
    "unreplayed": ("no pairs of the sample replayed", {"mixture": DATA["medpix"]["train"]["mixture"]}),
    "final-weights": ("no interpolation with the weights before", {"interpolate": 1.0}),
    "unaveraged": ("no averaged weights", {"ema": 0.0}),
    "all-negative": ("pairs of the same concepts are negatives", {"alike_pairs": "negatives"}),
}


@dataclass(frozen=True)
class Run:
    """One training and its measures."""

    data: str
    label: str
    seed: int
    family: str = "fuselip"
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.data}-{self.label}-{self.seed}"

    @property
    def model(self) -> dict[str, Any]:
        return {"family": self.family, "mask_token": self.family == "fuselip", "width": None}


def family_run(data: str, family: str, seed: int, **changed: Any) -> Run:
    """A run of the comparison proper, or with `changed` training settings; baselines predict no tokens."""
    off = {"mask_weight": 0.0, "mask_probability": 0.0, "codes_from_codebook": False}
    tuned = (TUNED_ON_BRAIN if data == "brain-mri" else TUNED)[family]
    return Run(data, family, seed, family, (off if family != "fuselip" else {}) | tuned | changed)


def all_runs() -> list[Run]:
    """In the order of their use: should the time run out, what is missing is missing last."""
    runs = [
        family_run(data, family, seed)
        for data in ("brain-mri", "sample", "vqa-rad", "medpix")
        for seed in SEEDS
        for family in FAMILIES
    ]
    for label, (_, changed) in ABLATIONS.items():
        runs += [Run("sample", label, seed, train=TUNED["fuselip"] | changed) for seed in SEEDS]
    for label, (_, changed) in ADAPTATIONS.items():
        runs += [Run("adapted", label, seed, train=GUARDED | changed) for seed in SEEDS]
    runs += [Run(data, FROM_SCRATCH, seed, train=TUNED["fuselip"]) for data in ("adapted", "retuned") for seed in SEEDS]
    return runs
