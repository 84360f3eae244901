"""Measures exact retrieval: the rank of every query in the whole pool, both directions, without approximation.

    python benchmarks/evaluate.py [--queries 10000] [--width 512] [--rounds 5] [--out FILE]

Random unit vectors, one right target each. Seconds: both directions, median of the rounds. Memory: the peak of the
whole process, embeddings and imports included. The last line is one JSON object.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

from typing import Any

import numpy as np
from measure import finish, in_rounds, machine, medians, parser_of, peak_memory_mb, resident_mb, spread, table, timed

from fuselip_core.evaluation.metrics import Relevance, ranks, recall

KS = (1, 5, 10)


def unit_vectors(count: int, width: int, rng: np.random.Generator) -> np.ndarray:
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure(queries: int, width: int, rounds: int) -> dict[str, Any]:
    imports = resident_mb()
    rng = np.random.default_rng(0)
    image, text = (unit_vectors(queries, width, rng) for _ in range(2))
    one_each = Relevance(np.arange(queries + 1), np.arange(queries), queries)

    def both_directions() -> None:
        recall(ranks(image, text, one_each), KS)
        recall(ranks(text, image, one_each), KS)

    seconds = in_rounds({"recall": timed(both_directions)}, rounds)
    return {
        "pool": [queries, queries, width],
        "seconds_both_directions": round(medians(seconds)["recall"], 3),
        "spread": round(spread(seconds["recall"]), 2),
        "peak_memory_mb": peak_memory_mb(),
        "imports_mb": imports,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    result = machine() | measure(given.queries, given.width, given.rounds)
    pool = " x ".join(f"{side:,}" for side in result["pool"])
    rows = [[pool, result["seconds_both_directions"], result["peak_memory_mb"]]]
    print(table(["queries x pool x width", "s", "peak of the process, MB"], rows))
    finish(result, given.out)


if __name__ == "__main__":
    main()
