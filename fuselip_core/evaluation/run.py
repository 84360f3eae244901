"""Evaluates the model of a run, or any models on the run's data; opens everything before the first measurement."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import fuselip_core
from fuselip_core.config import EvaluateSettings, Settings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import read_manifest
from fuselip_core.distributed import local_device
from fuselip_core.encoding.open import PIXELS, AnyModel, token_folder
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.before_after import measure_adaptation, open_adaptation
from fuselip_core.evaluation.candidates import SideEmbedder, measure_candidates
from fuselip_core.evaluation.classes import measure_classes
from fuselip_core.evaluation.comparisons import findings
from fuselip_core.evaluation.concepts import has_concepts, measure_concepts
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.evaluation.tasks import OpenSplit, open_split
from fuselip_core.evaluation.transformations import measure_transformations
from fuselip_core.files import read_numbers
from fuselip_core.model.comparison import is_comparison, load_comparison
from fuselip_core.model.embedder import Embedder

logger = logging.getLogger("fuselip")


@dataclass(frozen=True)
class Subject:
    """A model with its opened data: the split, training images for the probe, and evaluation sets."""

    embedder: SideEmbedder
    own: OpenSplit
    training: OpenSplit | None
    candidates: tuple[PreparedData, ...]

    @classmethod
    def open(
        cls, model: AnyModel, embedder: SideEmbedder, artifacts: Path, split: str, wanted: EvaluateSettings
    ) -> Subject:
        """Opens the data of the run in `artifacts`; raises FuselipError if any is missing or does not fit."""
        device = local_device()
        candidates = tuple(PreparedData(place) for place in (artifacts / "prepared", *wanted.candidates))
        own = open_split(model, artifacts, split, device)
        learns = "train" in own.store.manifest["splits"] and split != "train" and has_concepts(own.prepared, split)
        return cls(embedder, own, open_split(model, artifacts, "train", device) if learns else None, candidates)

    def measure(self, wanted: EvaluateSettings) -> EvaluationResult:
        """All measures of `wanted` that the data allow."""
        result = self.own.measure(wanted)
        for data in self.candidates:
            measure_candidates(self.embedder, data, wanted, result)
        own, training = self.own, self.training
        measure_classes(self.embedder, own.encoder, own.store, own.prepared, wanted, result)
        learned = (training.encoder, training.store) if training else None
        measure_concepts(self.embedder, (own.encoder, own.store), learned, own.prepared, wanted, result)
        measure_transformations(self.embedder, self.own.prepared, wanted, result)
        return result


def measure_run(settings: Settings) -> EvaluationResult:
    """All measures of `settings.evaluate` for the run's model, with the numbers of its training.

    Raises FuselipError for a model, folder or split that is missing or does not fit.
    """
    artifacts, wanted = settings.artifacts, settings.evaluate
    folder = artifacts / "model"
    if not (folder / "config.json").is_file():
        raise FuselipError(f"{folder} holds no trained model; run the train stage first")
    made = read_numbers(folder / "training.json")
    made |= read_numbers(artifacts / "codebook" / "codebook.json")
    split = held_out_split(artifacts, wanted.split)
    embedder = Embedder.from_pretrained(folder, local_device())
    before = open_adaptation(embedder.model, folder, artifacts, split, wanted, local_device())
    subject = Subject.open(embedder.model, embedder, artifacts, split, wanted)

    result = subject.measure(wanted)
    result.metrics |= measure_adaptation(before, result.metrics, wanted)
    result.metrics |= made
    _tell(result)
    shutil.rmtree(artifacts / PIXELS, ignore_errors=True)
    return result


def measure_models(settings: Settings, names: Sequence[str]) -> dict[str, EvaluationResult]:
    """The same measures for any models on the data of the run in `settings.artifacts`.

    A name is a hub id, a folder, models:/NAME@ALIAS, open_clip:NAME or transformers:NAME. Raises FuselipError for a
    model that is missing or of an unknown kind, and for missing data.
    """
    artifacts, wanted = settings.artifacts, settings.evaluate
    split = held_out_split(artifacts, wanted.split)
    subjects = {name: _opened(name, artifacts, split, wanted) for name in dict.fromkeys(names)}
    results = {}
    for name, subject in subjects.items():
        logger.info("measuring %s", name)
        results[name] = subject.measure(wanted)
        _tell(results[name])
    shutil.rmtree(artifacts / PIXELS, ignore_errors=True)
    return results


def _opened(name: str, artifacts: Path, split: str, wanted: EvaluateSettings) -> Subject:
    if is_comparison(name):
        towers = load_comparison(name, local_device())
        return Subject.open(towers, towers, artifacts, split, wanted)
    embedder = fuselip_core.Embedder.from_pretrained(name, local_device())  # which knows models:/ addresses
    return Subject.open(embedder.model, embedder, artifacts, split, wanted)


def _tell(result: EvaluationResult) -> None:
    for finding in findings(result.numbers()):
        logger.info("%s This is %s.", finding.sentence, finding.verdict)


def held_out_split(artifacts: Path, wanted: str) -> str:
    """The split to evaluate: `wanted` or, with a warning, valid or dev if it is missing; never test unasked."""
    splits: Collection[str] = read_manifest(token_folder(artifacts))["splits"]
    found = next((split for split in (wanted, "valid", "dev") if split in splits), None)
    if found is None:
        raise FuselipError(
            f"{token_folder(artifacts)} has no split {wanted}, valid or dev; set evaluate.split to one of "
            f"{', '.join(splits)}, or prepare.dev_share above 0"
        )
    if found != wanted:
        logger.warning("the data has no %s split: evaluating %s instead (evaluate.split)", wanted, found)
    return found
