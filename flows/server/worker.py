"""A worker that ends its runs with itself: ``python -m flows.server.worker`` and what ``prefect worker start`` takes.

Beside it, flows/server/recover.py puts the runs of a killed worker back in the queue: only their own machine knows at
once that they are gone. On SIGTERM, as from ``docker compose stop``, runs save their state; they go on with the next
start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from flows.server.stack import Stack, ending
from fuselip_core.errors import run_to_exit

RECOVER_EVERY = 30


def start_worker(stack: Stack, words: Sequence[str]) -> None:
    """Starts ``prefect worker start`` with these words, and recovery beside it."""
    stack.start("recover", "flows.server.recover", "--every", str(RECOVER_EVERY), replaceable=True)
    stack.start("worker", "prefect", "worker", "start", *words, replaceable=True)


def main() -> None:
    """Runs both, saying what they say, until a signal ends them."""
    stack = Stack(os.environ)
    with contextlib.suppress(KeyboardInterrupt), ending(stack):
        start_worker(stack, sys.argv[1:])
        stack.keep(lambda words: sys.stderr.write(f"{words}\n"))


if __name__ == "__main__":
    run_to_exit(main)
