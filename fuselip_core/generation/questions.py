"""`fuselip vqa generate`: makes questions and answers from captions, on all GPUs, and resumes after an interruption."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuselip_core.data.prepare.extra_pairs import names_of_concepts
from fuselip_core.data.prepare.rule_questions import questions_of
from fuselip_core.errors import FuselipError, sentence_of
from fuselip_core.generation.generated_questions import CaptionRow, Work, Write, caption_rows, generate, version_of


@dataclass(frozen=True)
class Job:
    """Parameters. captions: prepared data, or a table path,caption. model: None for rules over concepts.

    names: table CUI,Canonical name for the concepts of prepared data.
    """

    captions: Path
    out: Path
    model: str | None
    names: Path | None = None
    questions: int = 3
    part_rows: int = 256
    batch_size: int = 16
    max_new_tokens: int = 256
    seed: int = 0


def run(job: Job) -> bool:
    """Runs the job, as one of torchrun's processes or with a process for each GPU; True if it is complete."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    gpus = _gpus() if job.model is not None else 0
    if world > 1 or gpus < 2:
        return run_part(job, rank, world)
    from torch import multiprocessing

    sentences = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        multiprocessing.spawn(_one_of, args=(job, gpus, sentences), nprocs=gpus)
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        reason = "its process died, probably for lack of memory" if sentences.empty() else sentences.get()
        raise FuselipError(
            f"writing questions failed on GPU {error.error_index}: {reason}; the same command resumes from the "
            f"finished parts in {job.out}"
        ) from error
    return run_part(job, 0, 1, write=_nothing_left)


def run_part(job: Job, rank: int, world: int, write: Write | None = None) -> bool:
    """Runs the share of process `rank`; True if the job is complete. write: replaces the job's generator."""
    names = None
    if job.model is None:
        names = names_of_concepts(job.names) if job.names else {}
    work = Work(job.part_rows, job.batch_size, rank, world, _identity(job))
    return generate(lambda: caption_rows(job.captions, names), write or _writer(job, rank), job.out, work)


def _one_of(rank: int, job: Job, world: int, sentences: Any) -> None:
    try:
        run_part(job, rank, world)
    except Exception as error:
        sentences.put(sentence_of(error))
        raise


def _nothing_left(rows: Sequence[CaptionRow]) -> list[str]:
    raise FuselipError(f"{len(rows)} captions still have no questions; run the same command again")


def _writer(job: Job, rank: int) -> Write:
    """The generator. A model is loaded with the first caption, since a finished job needs none."""
    if job.model is None:
        return lambda rows: [_from_concepts(row, job.seed) for row in rows]
    model = functools.cache(lambda: _model(job, rank))
    return lambda rows: model()(rows)


def _model(job: Job, rank: int) -> Write:
    import torch

    from fuselip_core.generation.instruction_model import InstructionModel

    assert job.model is not None
    gpus = _gpus()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % gpus) if gpus else torch.device("cpu")
    return InstructionModel(job.model, device, job.max_new_tokens, job.questions)


def _from_concepts(row: CaptionRow, seed: int) -> str:
    """Questions by rules, in the output format of a model, so that both are checked in the same way."""
    pairs = questions_of(row.image_id, row.caption, row.concepts, row.modality, seed)
    return json.dumps([{"question": question, "answer": answer} for question, answer in pairs])


def _identity(job: Job) -> dict[str, Any]:
    """The parameters that the questions depend on."""
    identity: dict[str, Any] = {"captions": version_of(job.captions), "model": job.model}
    if job.model is None:
        return identity | {"names": version_of(job.names) if job.names else None, "seed": job.seed}
    from fuselip_core.generation.instruction_model import prompt_digest

    settings = {name: getattr(job, name) for name in ("questions", "batch_size", "max_new_tokens")}
    return identity | settings | {"prompt": prompt_digest()}


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
