"""The stage `evaluate`: opens everything it needs, then measures a trained encoder on a held-out split."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from fuselip_core.config import Settings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import read_manifest
from fuselip_core.distributed import local_device
from fuselip_core.encoding.open import PIXELS
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.before_after import measure_adaptation, open_adaptation
from fuselip_core.evaluation.candidates import measure_candidates
from fuselip_core.evaluation.classes import measure_classes
from fuselip_core.evaluation.comparisons import findings
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.evaluation.tasks import open_split
from fuselip_core.evaluation.transformations import measure_transformations
from fuselip_core.files import read_numbers
from fuselip_core.model.embedder import Embedder
from fuselip_core.model.hub import load_pretrained

logger = logging.getLogger("fuselip")


def measure_run(settings: Settings) -> EvaluationResult:
    """Every measure that `settings.evaluate` asks for, of the model of the run, with its training's numbers.

    Models, data and splits are opened first, so that a wrong setting ends the stage before anything is measured.
    Raises FuselipError for a model, folder or split that is missing or does not fit.
    """
    artifacts, wanted, device = settings.artifacts, settings.evaluate, local_device()
    folder = artifacts / "model"
    if not (folder / "config.json").is_file():
        raise FuselipError(f"{folder} holds no trained model; run the train stage first")
    made = read_numbers(folder / "training.json")
    made |= read_numbers(artifacts / "codebook" / "codebook.json")
    split = held_out_split(artifacts, wanted.split)
    candidates = [PreparedData(place) for place in (artifacts / "prepared", *wanted.candidates)]
    model, processor = load_pretrained(folder, device)
    before = open_adaptation(model, folder, artifacts, split, wanted, device)
    own = open_split(model, artifacts, split, device)

    result = own.measure(wanted)
    embedder = Embedder(model, processor)
    for data in candidates:
        measure_candidates(embedder, data, wanted, result)
    measure_classes(embedder, own.encoder, own.store, own.prepared, wanted, result)
    measure_transformations(embedder, own.prepared, wanted, result)
    result.metrics |= measure_adaptation(before, result.metrics, wanted)
    result.metrics |= made
    for finding in findings(result.numbers()):
        logger.info("%s This is %s.", finding.sentence, finding.verdict)
    shutil.rmtree(artifacts / PIXELS, ignore_errors=True)
    return result


def held_out_split(artifacts: Path, wanted: str) -> str:
    """The split to measure: `wanted`, or valid or dev where the tokens lack it, with a warning. Never test unasked."""
    splits: Collection[str] = read_manifest(artifacts / "tokens")["splits"]
    found = next((split for split in (wanted, "valid", "dev") if split in splits), None)
    if found is None:
        raise FuselipError(
            f"{artifacts / 'tokens'} has no split {wanted}, valid or dev; set evaluate.split to one of "
            f"{', '.join(splits)}, or prepare.dev_share above 0"
        )
    if found != wanted:
        logger.warning("the data has no %s split: measuring on %s instead (evaluate.split)", wanted, found)
    return found
