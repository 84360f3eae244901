"""A training of milliseconds a step in processes of its own, killed again and again: what test_killed.py starts.

    python killed_training.py FOLDER PROCESSES STEP,STEP,...

Every life of the run is made of new processes, forked from this one, which has imported all and computed nothing. When
the first of them has done the next of the steps named, it and the others get SIGKILL, wherever they are by then, and
the next life begins; the last one runs to the end. Each process appends a line for each step it did to losses-RANK.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny_store import settings_of, tiny_model

from fuselip_core.data.tokens.store import TokenStore
from fuselip_core.distributed import join_world
from fuselip_core.encoding.from_codes import TokenPairs
from fuselip_core.training.checkpoint import Checkpoints, seed_everything
from fuselip_core.training.loop import Trainer, run_folder

STEPS, EVERY = 30, 3
SETTINGS = settings_of(steps=STEPS, checkpoint_every=EVERY, ema=0.9, accumulation=2)


def train(folder: Path, rank: int, size: int, port: int, wait_at: int) -> None:
    """One process's whole life; behind step `wait_at` it waits for its death."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = join_world()
    store = TokenStore(folder / "store", "train")
    seed_everything(SETTINGS.seed)
    encoder = TokenPairs(tiny_model(), store, SETTINGS.mask_probability)
    checkpoints = Checkpoints(run_folder(folder / "checkpoints", SETTINGS, store))
    trainer = Trainer(encoder, store, SETTINGS, checkpoints, lambda *_: None, world=world)
    step_of = trainer._train_step

    def step(number: int) -> dict[str, Any]:
        metrics = step_of(number)
        values = [float(metrics[name]).hex() for name in ("loss", "contrastive", "masked", "grad_norm")]
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
        with (folder / f"losses-{rank}").open("a") as stream:
            stream.write(json.dumps([number, values, drawn]) + "\n")
        while number >= wait_at:
            time.sleep(1)
        return metrics

    trainer._train_step = step  # type: ignore[method-assign]
    trainer.run()
    if rank == 0:
        torch.save(trainer.model.state_dict(), folder / "model.pt")
    if size > 1:
        dist.destroy_process_group()


def live(folder: Path, size: int, kill_at: int | None) -> None:
    """One life of all processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    losses = folder / "losses-0"
    before = losses.stat().st_size if losses.exists() else 0
    wait_at = STEPS if kill_at is None else kill_at + 2  # so that a slow machine kills in time as well
    children = [fork(folder, rank, size, port, wait_at) for rank in range(size)]
    if kill_at is None:
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * size, "the last life ends by itself"
        return
    late = time.monotonic() + 100
    while last_step(losses, before) < kill_at:
        assert time.monotonic() < late, "no step is done"
        time.sleep(0.0005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert [os.waitpid(child, 0)[1] for child in children] == [signal.SIGKILL] * size, "killed before it was done"


def fork(folder: Path, *arguments: int) -> int:
    """The number of a new process that trains and ends."""
    if child := os.fork():
        return child
    try:
        train(folder, *arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def last_step(losses: Path, start: int) -> int:
    """The last step of the present life, whose lines begin at byte `start`; -1 if none is done."""
    lines = losses.read_bytes()[start:].splitlines(keepends=True) if losses.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])[0]) if whole else -1


if __name__ == "__main__":
    place, processes, kills = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for kill in [int(step) for step in kills.split(",") if step]:
        live(place, processes, kill)
    live(place, processes, None)
