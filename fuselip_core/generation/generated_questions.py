"""Checks questions and answers that a generator wrote from captions, stores them in parts, and merges the parts.

A generator takes captions and returns a text for each, which should be a JSON list of objects with question and answer.
`judged` keeps valid pairs and sets everything else aside with a reason. Parts are written atomically
(`parts/000012.jsonl`), so an interrupted run resumes with the first missing part. Several processes can share the work:
process r of w takes parts r, r + w, and so on.

    <split>.csv                       path,question,answer, as the sources cc3m-vqa and cc12m-vqa read them
    pairs-<split>-00000-of-00001.parquet   the same as prepared pairs (schemas.PAIR_SCHEMA)
    quarantine.jsonl, manifest.json   rows set aside, and counts
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fuselip_core.data.pair import (
    CLOSED_ANSWERS,
    DataError,
    Pair,
    Side,
    answer_text,
    fault_of_question,
    one_line,
    split_of_path,
)
from fuselip_core.data.prepare.rule_questions import known_values
from fuselip_core.data.prepare.tables import write_pair_shard
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.table_reader import read_table
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write, read_json, sha256_of, write_json
from fuselip_core.progress import track

JOB, PARTS, QUARANTINE, MANIFEST = "job.json", "parts", "quarantine.jsonl", "manifest.json"
MOST_ANSWER_WORDS = 12
DETAIL_LENGTH = 200


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """A captioned image. concepts: names, only if the generator needs them."""

    image_id: str
    split: str
    case: str
    caption: str
    modality: str | None = None
    concepts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """The result for a row: valid pairs (question, answer), and (reason, detail) of the others."""

    row: CaptionRow
    pairs: tuple[tuple[str, str], ...]
    set_aside: tuple[tuple[str, str], ...]


Write = Callable[[Sequence[CaptionRow]], Sequence[str]]


@dataclass(frozen=True)
class Work:
    """The division of work: parts of `part_rows` captions, batches of `batch_size`; this is process `rank`."""

    part_rows: int = 256
    batch_size: int = 16
    rank: int = 0
    world: int = 1
    identity: Mapping[str, Any] = field(default_factory=dict)


def caption_rows(source: Path, names: Mapping[str, str] | None = None) -> Iterator[CaptionRow]:
    """Captions of a prepared folder, or of a table with the columns path,caption, in order.

    names: concept code → name; if given, rows of a prepared folder have modality and concepts. Raises DataError.
    """
    if source.is_file():
        split = split_of_path(Path(source.name))
        for row in read_table(source, ("path", "caption")):
            yield CaptionRow(row["path"].strip(), split, row["path"].strip(), one_line(row["caption"]))
        return
    data = PreparedData(source)
    for split in data.splits:
        known = _concepts(data, split, names) if names is not None else {}
        for batch in data.pairs(split).to_batches(max_chunksize=4096):
            for row in batch.select(["kind", "case", "query_image", "target_text"]).to_pylist():
                if row["kind"] == "caption":
                    image = row["query_image"]
                    yield CaptionRow(image, split, row["case"], row["target_text"], *known.get(image, (None, ())))


def version_of(source: Path) -> str:
    """The version of prepared data, or the hash of a table."""
    return sha256_of(source) if source.is_file() else PreparedData(source).data_version


def _concepts(
    data: PreparedData, split: str, names: Mapping[str, str]
) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    return {
        row["image_id"]: (row["modality"], tuple(names[code] for code in row["concepts"] or () if code in names))
        for batch in data.iter_images(split, ["image_id", "modality", "concepts"])
        for row in batch.to_pylist()
    }


# ---- checking --------------------------------------------------------------------------------------------------------


def judged(row: CaptionRow, text: str) -> Judged:
    """Checks the text written for one caption."""
    found = _parsed(text)
    if isinstance(found, str):
        return Judged(row, (), ((found, _shown(text)),))
    pairs: dict[str, str] = {}
    set_aside = []
    for item in found:
        question, answer = one_line(str(item.get("question") or "")), answer_text(item.get("answer"))
        fault = _fault(question, answer, row, pairs)
        if fault:
            set_aside.append((fault, _shown(f"{question} | {answer}")))
        else:
            pairs[question] = answer
    if not found:
        set_aside.append(("no_question", _shown(text)))
    return Judged(row, tuple(pairs.items()), tuple(set_aside))


def _parsed(text: str) -> list[dict[str, Any]] | str:
    """The objects of the JSON list in a text, which models often wrap in other words; or the reason why not."""
    start, end = text.find("["), text.rfind("]")
    if start < 0:
        return "empty_output" if not text.strip() else "no_list"
    if end < start:
        return "cut_off"  # the list is not closed
    try:
        found = json.loads(text[start : end + 1])
    except (json.JSONDecodeError, RecursionError):
        return "not_json"
    return found if all(isinstance(item, dict) for item in found) else "no_objects"


def _fault(question: str, answer: str, row: CaptionRow, before: Mapping[str, str]) -> str | None:
    if fault := fault_of_question(question, answer):
        return fault
    if not question.endswith("?"):
        return "no_question_mark"
    if re.search(r"\bcaption\b", question, re.IGNORECASE):
        return "asks_about_caption"
    if len(answer.split()) > MOST_ANSWER_WORDS:
        return "long_answer"
    if question in before:
        return "repeated_question"
    return None if answer in CLOSED_ANSWERS or _is_supported(answer, row) else "unsupported_answer"


def _is_supported(answer: str, row: CaptionRow) -> bool:
    """Whether a word of the answer occurs in what is known about the image: a check against hallucination."""
    values = known_values(row.caption, row.concepts, row.modality).values()  # adds "ct" for "computed tomography"
    known = " ".join((row.caption, row.modality or "", *row.concepts, *values)).lower()
    words = set(re.findall(r"\w+", known))
    return any(word in words or (len(word) > 3 and word in known) for word in re.findall(r"\w+", answer))


def _shown(text: str) -> str:
    return one_line(text)[:DETAIL_LENGTH]


# ---- parts -----------------------------------------------------------------------------------------------------------


def generate(source: Callable[[], Iterator[CaptionRow]], write: Write, out: Path, work: Work) -> bool:
    """Writes this process's parts below `out` and, if none is missing, the result; True if the result is complete.

    Raises FuselipError if `out` has parts of another job.
    """
    _begin(out, work)
    total = sum(1 for _ in source())
    if not total:
        raise DataError("the source has no captions; give prepared data or a table with captions")
    count = -(-total // work.part_rows)
    parts = enumerate(_chunks(source(), work.part_rows))
    for number, rows in track(parts, f"writing questions, parts of {work.part_rows} captions", total=count):
        path = _part(out, number)
        if number % work.world == work.rank and not path.exists():
            _write_part(path, rows, write, work.batch_size)
    if not all(_part(out, number).exists() for number in range(count)):
        return False
    _put_together(out, count, work)
    return True


def _begin(out: Path, work: Work) -> None:
    """Raises FuselipError if `out` has parts of another model, prompt or table."""
    path = out / JOB
    described = json.loads(json.dumps({**work.identity, "part_rows": work.part_rows}, default=str))
    if not path.exists():
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        write_json(path, described)
    before = read_json(path, "name another folder with --out")
    wrong = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in described.items()
        if before.get(key) != value
    ]
    if wrong:
        raise FuselipError(f"{out} has questions of another job ({'; '.join(wrong)}); name another folder with --out")


def _part(out: Path, number: int) -> Path:
    return out / PARTS / f"{number:06d}.jsonl"


def _write_part(path: Path, rows: Sequence[CaptionRow], write: Write, batch_size: int) -> None:
    results = []
    for batch in _chunks(iter(rows), batch_size):
        texts = write(batch)
        results += [judged(row, text) for row, text in zip(batch, texts, strict=True)]
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for result in results:
            stream.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")


def _chunks(rows: Iterator[CaptionRow], size: int) -> Iterator[list[CaptionRow]]:
    while chunk := list(islice(rows, size)):
        yield chunk


# ---- result ----------------------------------------------------------------------------------------------------------


def _put_together(out: Path, count: int, work: Work) -> None:
    """Writes a table and a shard of pairs for each split, in the order of the captions."""
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    with ExitStack() as files:

        def opened(path: Path) -> TextIO:
            partial = files.enter_context(atomic_write(path))
            return files.enter_context(partial.open("w", encoding="utf-8", newline=""))

        quarantine, tables = opened(out / QUARANTINE), dict[str, Any]()
        for result in _results(out, count):
            row = result.row
            if row.split not in tables:
                counts[row.split] = Counter()
                tables[row.split] = csv.writer(opened(out / f"{row.split}.csv"), lineterminator="\n")
                tables[row.split].writerow(["path", "question", "answer"])
            tables[row.split].writerows((row.image_id, *pair) for pair in result.pairs)
            counts[row.split].update(captions=1, pairs=len(result.pairs))
            for reason, detail in result.set_aside:
                reasons[reason] += 1
                aside = {"id": row.image_id, "split": row.split, "reason": reason, "detail": detail}
                quarantine.write(json.dumps(aside, ensure_ascii=False) + "\n")
    for split in counts:
        of_split = (result for result in _results(out, count) if result.row.split == split)
        write_pair_shard(out / f"pairs-{split}-00000-of-00001.parquet", _pairs(of_split))
    content = {**work.identity, "counts": counts, "quarantine": dict(sorted(reasons.items()))}
    write_json(out / MANIFEST, json.loads(json.dumps(content, default=str)))


def _results(out: Path, count: int) -> Iterator[Judged]:
    for number in range(count):
        with _part(out, number).open(encoding="utf-8") as stream:
            for line in stream:
                content = json.loads(line)
                row = CaptionRow(**(content["row"] | {"concepts": tuple(content["row"]["concepts"])}))
                pairs = tuple((question, answer) for question, answer in content["pairs"])
                yield Judged(row, pairs, tuple((reason, detail) for reason, detail in content["set_aside"]))


def _pairs(results: Iterable[Judged]) -> Iterator[Pair]:
    for result in results:
        row = result.row
        for number, (question, answer) in enumerate(result.pairs):
            yield Pair(
                f"{row.image_id}/generated-{number}",
                row.split,
                "vqa",
                row.image_id,
                row.case,
                Side(row.image_id, question),
                Side(text=answer),
                "closed" if answer in CLOSED_ANSWERS else "open",
            )
