"""The embedded sample: a radiology-like data set, drawn from a seed, in exactly the published layout of ROCOv2.

    {train,valid,test}_images.zip            members <split>/<ID>.jpg, grey JPEG
    {train,valid,test}_captions.csv          ID,Caption
    {train,valid,test}_concepts.csv          ID,CUIs (separated by semicolons)
    {train,valid,test}_concepts_manual.csv   ID,CUIs: modality and body region only
    {train,valid,test}_questions.csv         ID,Question,Answer (not in ROCOv2)
    cui_mapping.csv                          CUI,Canonical name
    license_information.csv                  ID,PMCID,Attribution,Link

A caption mentions the study, the number of lesions, their side and tone, size and level of the largest, and one more
finding. Sides are the patient's: a lesion in the left half of the image is on the right. Splits are independent. One to
three images share a PMCID, which is their case. The same seed gives the same bytes on every machine (the lock file pins
Pillow's JPEG encoder).
"""

from __future__ import annotations

import csv
import functools
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from fuselip_core.data.phantom.anatomy import Lesion, Scene, draw
from fuselip_core.data.phantom.canvas import RIGHT
from fuselip_core.data.workers import process_pool
from fuselip_core.files import atomic_write, read_json
from fuselip_core.progress import track

COUNTS: Mapping[str, int] = {"train": 4000, "valid": 300, "test": 400}
SPLITS = ("train", "valid", "test")
SIDES_OF_IMAGE = (112, 153)  # pixels, smallest and one more than the largest
SMALL, MEDIUM, LARGE = 14, 22, 32  # millimetres
QUESTIONS_AN_IMAGE = 4
JPEG_QUALITY = 90
CASES_AT_ONCE = 256


@dataclass(frozen=True)
class Sample:
    """One image with its rows in all published files."""

    identifier: str
    case: str
    image: bytes
    caption: str
    concepts: tuple[str, ...]
    concepts_manual: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


def draw_data_set(folder: Path, seed: int = 0, counts: Mapping[str, int] = COUNTS, workers: int = 1) -> None:
    """Writes the data set into `folder`, every file atomically, `license_information.csv` last.

    counts: number of images by split; other splits are not written. workers: processes that draw; their number does not
    affect the result. Raises ValueError for an unknown split.
    """
    unknown = set(counts) - set(SPLITS)
    if unknown:
        raise ValueError(f"the phantom has the splits {', '.join(SPLITS)}, not {', '.join(sorted(unknown))}")
    folder.mkdir(parents=True, exist_ok=True)
    licences: list[Sequence[str]] = []
    with process_pool(workers) as pool:
        for split in SPLITS:
            if split in counts:
                licences += _write_split(folder, split, seed, counts[split], pool)
    _write_csv(folder / "cui_mapping.csv", ("CUI", "Canonical name"), sorted(_wording()["concepts"].values()))
    _write_csv(folder / "license_information.csv", ("ID", "PMCID", "Attribution", "Link"), licences)


def _write_split(folder: Path, split: str, seed: int, count: int, pool: Executor | None) -> list[Sequence[str]]:
    wording = _wording()
    captions, concepts, manual, questions, licences = [], [], [], [], []
    with atomic_write(folder / f"{split}_images.zip") as path, zipfile.ZipFile(path, "w") as archive:
        for sample in track(_samples(split, seed, count, pool), f"draw {split}", total=count):
            # A fixed time stamp, so that the archive does not depend on the date.
            member = zipfile.ZipInfo(f"{split}/{sample.identifier}.jpg", (2026, 1, 1, 0, 0, 0))
            member.create_system, member.external_attr = 3, 0o100644 << 16
            archive.writestr(member, sample.image)
            captions.append((sample.identifier, sample.caption))
            concepts.append((sample.identifier, ";".join(sample.concepts)))
            manual.append((sample.identifier, ";".join(sample.concepts_manual)))
            questions += [(sample.identifier, *question) for question in sample.questions]
            licences.append((sample.identifier, sample.case, wording["attribution"], wording["link"]))
    _write_csv(folder / f"{split}_captions.csv", ("ID", "Caption"), captions)
    _write_csv(folder / f"{split}_concepts.csv", ("ID", "CUIs"), concepts)
    _write_csv(folder / f"{split}_concepts_manual.csv", ("ID", "CUIs"), manual)
    _write_csv(folder / f"{split}_questions.csv", ("ID", "Question", "Answer"), questions)
    return cast(list[Sequence[str]], licences)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _samples(split: str, seed: int, count: int, pool: Executor | None) -> Iterator[Sample]:
    """The first `count` samples of a split, in order; the last case may be cut."""
    make = functools.partial(draw_case, split, seed)
    case = done = 0
    while done < count:
        # Every case has at least one image, so no more cases than missing images are needed.
        cases = range(case, case + min(CASES_AT_ONCE, count - done))
        case = cases.stop
        for samples in map(make, cases) if pool is None else pool.map(make, cases, chunksize=16):
            for sample in samples[: count - done]:
                done += 1
                yield sample


def draw_case(split: str, seed: int, case: int) -> list[Sample]:
    """The one to three images of a case: one region, any modalities."""
    rng = np.random.default_rng([seed, SPLITS.index(split), case])
    region = _choose(rng, ("head", "chest", "abdomen"))
    samples = []
    for position in range(int(rng.integers(1, 4))):
        scene = _draw_scene(rng, region)
        width, height = (int(side) for side in rng.integers(*SIDES_OF_IMAGE, 2))
        stream = io.BytesIO()
        Image.fromarray(draw(scene, width, height, rng)).save(stream, "JPEG", quality=JPEG_QUALITY)
        modality, *others = _concepts(scene)
        samples.append(
            Sample(
                identifier=f"ROCOv2_2023_{split}_{3 * case + position + 1:06d}",
                case=f"PMC{SPLITS.index(split) + 1}{case:06d}",
                image=stream.getvalue(),
                caption=_caption(rng, scene),
                concepts=(modality, *others),
                concepts_manual=(modality, others[0]),
                questions=_questions(rng, scene),
            )
        )
    return samples


def _draw_scene(rng: np.random.Generator, region: str) -> Scene:
    modality = _choose(rng, ("ct", "mr", "xray", "us"))
    number = _choose(rng, (0, 1, 2, 3), (0.1, 0.36, 0.27, 0.27))
    # With several lesions, exactly one is the largest, so that its level is well defined.
    largest = _choose(rng, (SMALL, MEDIUM, LARGE), (0.7, 0.15, 0.15) if number == 1 else (0.0, 0.5, 0.5))
    side = _choose(rng, (-1, 1))
    levels = [int(level) for level in rng.permutation(3)[:number]]
    lesions = tuple(Lesion(side, level, SMALL if place else largest) for place, level in enumerate(levels))
    return Scene(
        modality, region, finding=_choose(rng, (False, True)), bright=_choose(rng, (False, True)), lesions=lesions
    )


def _concepts(scene: Scene) -> list[str]:
    """Codes of modality and region, then of findings."""
    wording = _wording()
    names = [scene.modality, scene.region]
    if scene.lesions:
        names += ["lesion", _side(scene)]
    if scene.finding:
        names.append(wording["studies"][scene.study]["finding"])
    return [wording["concepts"][name][0] for name in names]


def _side(scene: Scene) -> str:
    return "right" if scene.lesions[0].side == RIGHT else "left"


def _caption(rng: np.random.Generator, scene: Scene) -> str:
    wording = _wording()
    study, modality = wording["studies"][scene.study], wording["modalities"][scene.modality]
    number = len(scene.lesions)
    noun, nouns = _choose(rng, modality["noun"])
    parts = {
        "study": _choose(rng, study["names"]),
        "finding": _choose(rng, wording["findings"][study["finding"]]["present" if scene.finding else "absent"]),
        "noun": noun,
        "nouns": nouns,
        "tone": _choose(rng, modality["bright" if scene.bright else "dark"]),
        "organ": _choose(rng, wording["organs"][scene.region]),
        "count": wording["counts"][number],
    }
    if number:
        largest = scene.lesions[0]
        parts["side"] = _side(scene)
        parts["level"] = _choose(rng, wording["views"][study["view"]][largest.level])
        parts["size"] = _choose(rng, (f"{largest.millimetres} mm", f"{largest.millimetres / 10} cm"), (0.8, 0.2))
        parts["size_word"] = wording["size_words"][str(largest.millimetres)]
    template = _choose(rng, wording["captions"]["none" if not number else "one" if number == 1 else "many"])
    sentences = template.format(**parts).split(". ")
    text = ". ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)
    return text.replace("a opaque", "an opaque").replace("a an", "an an").replace("a e", "an e")


def _questions(rng: np.random.Generator, scene: Scene) -> tuple[tuple[str, str], ...]:
    """Four questions of different kinds, with probabilities that keep the answers of each kind balanced."""
    kinds = [_choose(rng, ("modality", "region", "study"))]
    if not scene.lesions:
        kinds += [_choose(rng, [kind for kind in ("modality", "region", "study") if kind != kinds[0]])]
        kinds += ["count", "presence"]
    else:
        number, size = len(scene.lesions), scene.lesions[0].millimetres
        weights = {
            "side": 0.09,
            "level": 0.11,
            "place": 0.26,
            "count": 0.17 if number == 1 else 0.26,
            "size": 0.3 if size == SMALL else 0.24,
            "tone": 0.09,
            "presence": 0.05,
            "presence_side": 0.07,
        }
        while len(kinds) < QUESTIONS_AN_IMAGE:
            total = sum(weights.values())
            kind = _choose(rng, list(weights), [weight / total for weight in weights.values()])
            del weights[kind]
            kinds.append(kind)
    return tuple(_ask(rng, scene, kind) for kind in kinds)


def _ask(rng: np.random.Generator, scene: Scene, kind: str) -> tuple[str, str]:
    wording = _wording()
    asked_side = _choose(rng, ("right", "left"))
    question = _choose(rng, wording["questions"][kind]).format(side=asked_side)
    answers = {
        "modality": wording["modalities"][scene.modality]["answer"],
        "region": wording["regions"][scene.region],
        "study": wording["studies"][scene.study]["answer"],
        "count": wording["count_answers"][len(scene.lesions)],
        "presence": "yes" if scene.lesions else "no",
    }
    if scene.lesions:
        level = wording["levels"][scene.lesions[0].level]
        answers |= {
            "side": _side(scene),
            "level": level,
            "place": f"{_side(scene)} side, {level}",
            "size": f"{scene.lesions[0].millimetres} mm",
            "tone": "brighter" if scene.bright else "darker",
            "presence_side": "yes" if _side(scene) == asked_side else "no",
        }
    return question, answers[kind]


def _choose(rng: np.random.Generator, options: Sequence[Any], shares: Sequence[float] | None = None) -> Any:
    """One of the options, equally likely unless `shares` says otherwise."""
    if shares is None:
        return options[int(rng.integers(len(options)))]
    drawn, below = rng.random(), 0.0
    for option, share in zip(options, shares, strict=True):
        below += share
        if drawn < below:
            return option
    return options[-1]


@functools.cache
def _wording() -> dict[str, Any]:
    """Names, templates and codes."""
    return read_json(Path(__file__).with_name("phantom.json"))
