"""What recall at 10 on brain MRI asks for: the recall of a model that knows only some facts of each caption.

    python benchmarks/caption_ceiling.py test

Captions whose known facts are equal cannot be told apart and come in random order; all others are ranked right. Prints
one JSON object: facts that are known → expected recall at 10 in percent, beside chance and the number of captions.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter

from measure import SHARED

K = 10
FACTS = {
    "kind": r"glioma|meningioma|pituitary",
    "side": r"left side|right side|midline|centre",
    "third": r"upper|middle|lower",
    "size": r"small|medium|large",
    "millimetres": r"\d+ (?:x|by) \d+",
}


def recall_of(facts: list[tuple[str, ...]]) -> float:
    """Expected recall at K of queries that find the captions with their own facts first, those in random order."""
    alike = Counter(facts)
    return sum(min(1.0, K / alike[each]) for each in facts) / len(facts)


def main() -> None:
    split = sys.argv[1] if len(sys.argv) > 1 else "test"
    with (SHARED / "brain-mri-rocov2" / f"{split}_captions.csv").open(encoding="utf-8", newline="") as file:
        captions = [row["Caption"].lower() for row in csv.DictReader(file)]
    found = [tuple("".join(re.findall(pattern, text)[:1]) for pattern in FACTS.values()) for text in captions]
    known = {"captions": len(captions), "different": len(set(captions)), "chance": round(100 * K / len(captions), 1)}
    for count, name in enumerate(FACTS, start=1):
        known[f"up to {name}"] = round(100 * recall_of([facts[:count] for facts in found]), 1)
    print(json.dumps(known))


if __name__ == "__main__":
    main()
