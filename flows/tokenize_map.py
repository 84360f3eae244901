"""Images to codes on many processes or machines: ``python -m flows.tokenize_map --settings params.yaml --workers 2``.

Each shard is a Prefect task, which Dask hands to its workers: processes of this machine, or those of the cluster whose
scheduler ``--scheduler tcp://host:8786`` names; its machines must see the artifacts under the same path. The tokenize
stage of the pipeline then finds all codes there and only adds the texts.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed import LocalCluster
from prefect import Flow, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect_dask import DaskTaskRunner

from fuselip_core.config import Settings, load_settings
from fuselip_core.errors import FuselipError

RETRIES = 2


@task(name="shard", task_run_name="{split}-{start}", cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=10)
def tokenize_shard(settings: Settings, split: str, start: int, stop: int) -> int:
    """Codes of the images of one shard, written where they belong; returns their number."""
    from fuselip_core.tokenizer.tokenize import write_shard

    return write_shard(settings, (split, start, stop))


@flow(name="tokenize-map")
def tokenize_map(settings: Settings) -> int:
    """Every pending shard, in whatever order and place; returns the number of images."""
    from fuselip_core.tokenizer.tokenize import pending_shards

    futures = [tokenize_shard.submit(settings, *shard) for shard in pending_shards(settings)]
    wait(futures)
    return sum(future.result() for future in futures)


def tokenize_with(settings: Settings, workers: int, scheduler: str | None = None) -> int:
    """Runs the flow on the workers of `scheduler`, or on `workers` processes of this machine."""
    if scheduler:
        return _on(scheduler)(settings)
    cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0")
    try:
        return _on(cluster.scheduler_address)(settings)
    finally:
        # On a busy machine workers end later than Dask waits for them; it kills them, and their shards are on disk.
        with contextlib.suppress(TimeoutError):
            cluster.close()


def _on(scheduler: str) -> Flow[[Settings], int]:
    runner: Any = DaskTaskRunner(address=scheduler)
    return tokenize_map.with_options(task_runner=runner)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tokenizes what the command line's settings mean; an error is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m flows.tokenize_map", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--settings", type=Path, default=Path("params.yaml"), help="settings file of the run")
    parser.add_argument("--workers", type=int, default=2, help="processes on this machine")
    parser.add_argument("--scheduler", help="address of a Dask scheduler, in place of processes here")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.settings)
        settings = settings.model_copy(update={"artifacts": settings.artifacts.resolve()})
        images = tokenize_with(settings, options.workers, options.scheduler)
    except (FuselipError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(f"{images} images tokenized; the tokenize stage adds the texts\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
