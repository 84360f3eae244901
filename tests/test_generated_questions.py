"""Questions written from captions: by a tiny model made here, by a stub, and by rules, all through the same code."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from training_data import write_raw

from fuselip_core.config import PrepareSettings
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.prepare.rule_questions import known_values, questions_of
from fuselip_core.data.shards.schemas import PAIR_SCHEMA
from fuselip_core.data.sources.catalogue import list_source
from fuselip_core.errors import FuselipError, sentence_of
from fuselip_core.generation import questions
from fuselip_core.generation.generated_questions import CaptionRow, Work, caption_rows, generate, judged
from fuselip_core.generation.questions import Job, run_part

CAPTION = "Axial CT of the chest shows a nodule in the left lung."
ROW = CaptionRow("a.jpg", "train", "a.jpg", CAPTION)


def write_table(folder: Path, rows: int = 12) -> Path:
    path = folder / "train.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "caption"])
        writer.writerows(
            [f"images/{number:03d}.jpg", f"Axial CT number {number} of the head."] for number in range(rows)
        )
    return path


def stub(rows: Sequence[CaptionRow]) -> list[str]:
    """One good question, one malformed text for every fifth caption."""
    good = '[{"question": "What imaging modality is this?", "answer": "CT"}]'
    return ["I cannot do that." if row.image_id.endswith(("0.jpg", "5.jpg")) else f"Sure!\n{good}" for row in rows]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty_output"),
        ("There is a nodule.", "no_list"),
        ('[{"question": "What is shown?", "answer": "a no', "cut_off"),
        ("[What is shown? A nodule]", "not_json"),
        ('["What is shown?"]', "no_objects"),
        ("[]", "no_question"),
        ('[{"question": "", "answer": "nodule"}]', "empty_question"),
        ('[{"question": "What is shown?"}]', "empty_answer"),
        ('[{"question": "What is shown", "answer": "nodule"}]', "no_question_mark"),
        ('[{"question": "What does the caption say?", "answer": "nodule"}]', "asks_about_caption"),
        ('[{"question": "What is shown?", "answer": "' + "nodule " * 13 + '"}]', "long_answer"),
        ('[{"question": "What is shown?", "answer": "fracture"}]', "unsupported_answer"),
    ],
)
def test_malformed_output_is_set_aside_with_its_reason(text: str, reason: str) -> None:
    result = judged(ROW, text)
    assert result.pairs == () and [found for found, _ in result.set_aside] == [reason]


def test_good_pairs_of_a_partly_bad_output_are_kept() -> None:
    items = [
        {"question": "What imaging  modality is this?", "answer": "CT"},
        {"question": "Is there a nodule?", "answer": "Yes"},
        {"question": "Is there a nodule?", "answer": "Yes"},
        {"question": "Which side?", "answer": "Left"},
        {"question": "Who is this?", "answer": "somebody else"},
    ]
    result = judged(ROW, f"```json\n{json.dumps(items)}\n```")
    assert dict(result.pairs) == {
        "What imaging modality is this?": "ct",
        "Is there a nodule?": "yes",
        "Which side?": "left",
    }
    assert [reason for reason, _ in result.set_aside] == ["repeated_question", "unsupported_answer"]


def test_stub_becomes_the_published_table_and_prepared_pairs(tmp_path: Path) -> None:
    table, out = write_table(tmp_path), tmp_path / "out"
    assert generate(lambda: caption_rows(table), stub, out, Work(part_rows=5, batch_size=2))
    rows = read_csv(out / "train.csv")
    assert len(rows) == 9 and rows[0] == {
        "path": "images/001.jpg",
        "question": "What imaging modality is this?",
        "answer": "ct",
    }
    import pyarrow.parquet as pq

    pairs = pq.read_table(out / "pairs-train-00000-of-00001.parquet", schema=PAIR_SCHEMA).to_pylist()
    assert [(row["query_image"], row["query_text"], row["target_text"]) for row in pairs] == [
        (row["path"], row["question"], row["answer"]) for row in rows
    ]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {"train": {"captions": 12, "pairs": 9}} and manifest["quarantine"] == {"no_list": 3}
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 3
    # The published source reads the table as it is.
    assert len(list_source("cc3m-vqa", out).pairs) == 9


def test_shares_of_several_processes_make_the_same_result(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    for rank in range(3):
        complete = generate(lambda: caption_rows(table), stub, tmp_path / "three", Work(2, 2, rank, 3))
        assert complete == (rank == 2)
    generate(lambda: caption_rows(table), stub, tmp_path / "one", Work(2, 2))
    for name in ("train.csv", "quarantine.jsonl", "manifest.json", "pairs-train-00000-of-00001.parquet"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_finished_part_is_never_written_again(tmp_path: Path) -> None:
    table, asked = write_table(tmp_path), list[str]()

    def failing(rows: Sequence[CaptionRow]) -> list[str]:
        if len(asked) >= 8:
            raise RuntimeError("killed")
        asked.extend(row.image_id for row in rows)
        return stub(rows)

    with pytest.raises(RuntimeError):
        generate(lambda: caption_rows(table), failing, tmp_path / "out", Work(4, 4))
    before = list(asked)
    asked.clear()
    assert generate(lambda: caption_rows(table), failing, tmp_path / "out", Work(4, 4))
    assert not set(before) & set(asked) and len(before) + len(asked) == 12


def test_another_job_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    generate(lambda: caption_rows(table), stub, tmp_path / "out", Work(identity={"model": "a"}))
    with pytest.raises(FuselipError, match=r"model was 'a' and is 'b'.*another folder with --out"):
        generate(lambda: caption_rows(table), stub, tmp_path / "out", Work(identity={"model": "b"}))


# ---- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and a tokenizer of single bytes, in a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {letter: number + 1 for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0, **letters}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config.eos_token_id = config.bos_token_id = 0
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_a_random_model_runs_through_the_same_path(tmp_path: Path, tiny_model: Path) -> None:
    table = write_table(tmp_path, rows=5)
    job = Job(table, tmp_path / "out", str(tiny_model), part_rows=2, batch_size=2, max_new_tokens=8)
    assert run_part(job, 0, 1)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    # Random weights write noise: all of it is set aside with a reason, and none is lost.
    assert manifest["counts"]["train"] == {"captions": 5, "pairs": 0}
    assert sum(manifest["quarantine"].values()) == 5
    assert manifest["model"] == str(tiny_model) and len(manifest["prompt"]) == 64


def test_a_model_sees_the_caption_and_pads_on_the_left(tiny_model: Path) -> None:
    import torch

    from fuselip_core.generation.instruction_model import InstructionModel

    model = InstructionModel(str(tiny_model), torch.device("cpu"), max_new_tokens=6)
    assert CAPTION in model._prompt(CAPTION) and model._prompt(CAPTION).startswith("system: ")
    other = CaptionRow("b.jpg", "train", "b.jpg", "Short.")
    alone, together = model([ROW]) + model([other]), model([ROW, other])
    assert alone == together


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    job = Job(write_table(tmp_path), tmp_path / "out", str(tmp_path / "nowhere"))
    with pytest.raises(FuselipError, match=r"cannot be loaded .* give a folder with a model"):
        run_part(job, 0, 1)


def test_several_processes_share_a_job_and_a_failed_one_is_one_sentence(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `fuselip vqa generate` does on two GPUs, here on processes of the CPU."""
    monkeypatch.setattr(questions, "_gpus", lambda: 2)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    table = write_table(tmp_path, rows=6)
    with pytest.raises(FuselipError) as caught:
        questions.run(Job(table, tmp_path / "failed", str(tmp_path / "nowhere")))
    said = sentence_of(caught.value)
    assert re.match(r"writing questions failed on GPU [01]: the instruction model '.*' cannot be loaded", said)
    assert said.endswith(f"the same command resumes from the finished parts in {tmp_path / 'failed'}")
    assert "Traceback" not in said and "unexpected" not in said
    job = Job(table, tmp_path / "two", str(tiny_model), part_rows=2, batch_size=2, max_new_tokens=8)
    assert questions.run(job)
    monkeypatch.undo()
    assert run_part(replace(job, out=tmp_path / "one"), 0, 1)
    for name in ("train.csv", "quarantine.jsonl", "manifest.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_killed_and_started_again_it_ends_as_if_never_killed(tmp_path: Path, tiny_model: Path) -> None:
    table = write_table(tmp_path, rows=24)
    options = ["--model", str(tiny_model), "--part-rows", "2", "--batch-size", "2", "--max-new-tokens", "48"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fuselip_core", "vqa", "generate", str(table), "--out", str(out), *options]
        return subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})

    killed = start(tmp_path / "killed")
    parts = tmp_path / "killed" / "parts"
    deadline = time.monotonic() + 240
    while len(list(parts.glob("*.jsonl"))) < 2 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finished = len(list(parts.glob("*.jsonl")))
    assert 2 <= finished < 12
    assert start(tmp_path / "killed").wait() == 0
    assert run_part(Job(table, tmp_path / "whole", str(tiny_model), None, 3, 2, 2, 48), 0, 1)
    for name in ("train.csv", "quarantine.jsonl", "manifest.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_rules_ask_only_what_is_known() -> None:
    pairs = dict(questions_of("x", CAPTION, ["Nodule", "X-Ray Computed Tomography"], "CT"))
    assert pairs["What imaging modality is this?"] == "ct"
    assert pairs["In which plane is this image?"] == "axial"
    assert pairs["Which body part is shown?"] == "chest"
    assert pairs["On which side is the finding?"] == "left"
    assert pairs["Does this image show nodule?"] == "yes"
    assert questions_of("x", "Image after treatment.", []) == []
    assert "side" not in known_values("Arrows at the left and right kidney.", [])
    assert "side" not in known_values("Dilated left ventricle.", [])
    assert "body part" not in known_values("From the head to the pelvis.", [])
    # "X-Ray Computed Tomography" is the concept's name; it is no X-ray.
    assert known_values("", ["X-Ray Computed Tomography"])["modality"] == "CT"


def test_no_is_only_said_of_what_is_ruled_out() -> None:
    answers = {}
    for number in range(200):
        for question, answer in questions_of(f"image-{number}", "PET-CT of the chest, axial.", [], "PET-CT"):
            answers.setdefault(question, set()).add(answer)
    closed = {question: answer for question, answer in answers.items() if answer & {"yes", "no"}}
    assert all(len(answer) == 1 for answer in closed.values()), "a question has one answer for an image"
    assert closed["Is the modality of this image PET-CT?"] == {"yes"}
    assert closed["Is the modality of this image ultrasound?"] == {"no"}
    for unsure in ("modality of this image CT", "modality of this image PET?", "show the heart", "show the abdomen"):
        assert not [question for question in closed if unsure in question]
    drawn = [answer for n in range(200) for _, answer in questions_of(f"{n}", "MRI, coronal.", [])]
    share = drawn.count("yes") / (drawn.count("yes") + drawn.count("no"))
    assert 0.4 < share < 0.6


def test_rules_on_prepared_data_through_the_command_line(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=6, held_out=2)
    settings = PrepareSettings(source="rocov2", root=tmp_path / "raw", workers=1)
    prepare_data(settings, tmp_path / "prepared")
    command = [sys.executable, "-m", "fuselip_core", "vqa", "generate", str(tmp_path / "prepared"), "--out"]
    command += [str(tmp_path / "out"), "--generator", "concepts"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and re.search(r"error: .*--names", refused.stderr)
    lost = subprocess.run([*command, "--names", str(tmp_path / "absent.csv")], capture_output=True, text=True)
    assert lost.returncode == 1 and "absent.csv does not exist; give" in lost.stderr and "Traceback" not in lost.stderr
    names = str(tmp_path / "raw" / "cui_mapping.csv")
    done = subprocess.run([*command, "--names", names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["counts"]
    assert set(counts) == {"train", "valid", "test"} and counts["train"]["captions"] == 6
    rows = read_csv(tmp_path / "out" / "train.csv")
    assert sum(row["question"] == "What imaging modality is this?" and row["answer"] == "ct" for row in rows) == 6
