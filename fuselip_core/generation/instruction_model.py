"""An instruction model (transformers) that writes questions and answers from captions."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.files import read_json
from fuselip_core.generation.generated_questions import CaptionRow

PROMPT = "question_prompt.json"
MOST_CAPTION_LETTERS = 4000  # longer captions would leave too little context for the instruction


class InstructionModel:
    """Captions → texts, by greedy decoding, so that equal batches give equal texts. `name`: a hub id or a folder."""

    def __init__(self, name: str, device: torch.device, max_new_tokens: int = 256, questions: int = 3) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            # Left padding, as needed for generating from batches.
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            reason = one_line(error)[:200]
            raise FuselipError(
                f"the instruction model '{name}' cannot be loaded ({reason}); give a folder with a model, or accept "
                "its licence on the Hub and log in"
            ) from error
        self.model = model.to(device).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device, self.max_new_tokens, self.questions = device, max_new_tokens, questions

    @torch.inference_mode()
    def __call__(self, rows: Sequence[CaptionRow]) -> list[str]:
        """The model's text for each caption."""
        prompts = [self._prompt(row.caption[:MOST_CAPTION_LETTERS]) for row in rows]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not self._has_template)
        batch = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
        try:
            ids = self.model.generate(
                **batch,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        except torch.OutOfMemoryError as error:
            raise FuselipError(
                f"out of memory with {len(rows)} captions in a batch; lower --batch-size and resume"
            ) from error
        return list(self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))

    @property
    def _has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def _prompt(self, caption: str) -> str:
        words = _prompt_words()
        user = words["user"].format(caption=caption, count=self.questions)
        if not self._has_template:
            return f"{words['system']}\n\n{user}\n"
        messages = [{"role": "system", "content": words["system"]}, {"role": "user", "content": user}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def prompt_digest() -> str:
    """SHA-256 of the prompt, which is part of a job's identity."""
    return hashlib.sha256(json.dumps(_prompt_words(), sort_keys=True).encode()).hexdigest()


@functools.cache
def _prompt_words() -> dict[str, str]:
    return read_json(Path(__file__).with_name(PROMPT))
