"""Tokenizes on several processes or machines: ``python -m flows.tokenize_map --settings params.yaml --workers 2``.

Each shard is a Prefect task, which Dask hands to its workers: processes of this machine, or those of the cluster whose
scheduler ``--scheduler tcp://host:8786`` names; its machines must see the artifacts under the same path. The tokenize
stage of the pipeline then finds all codes there and only adds the texts.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from distributed import LocalCluster
from prefect import Flow, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect_dask import DaskTaskRunner

from fuselip_core.config import Settings, load_settings
from fuselip_core.errors import run_to_exit

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


def main(
    settings: Annotated[Path, typer.Option(help="Settings file of the run.")] = Path("params.yaml"),
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 2,
    scheduler: Annotated[str | None, typer.Option(help="Dask scheduler to use instead, tcp://host:8786.")] = None,
) -> None:
    """Turn images into codes on many processes or machines."""
    run = load_settings(settings)
    run = run.model_copy(update={"artifacts": run.artifacts.resolve()})
    images = tokenize_with(run, workers, scheduler)
    typer.echo(f"{images} images tokenized; the tokenize stage adds the texts")


if __name__ == "__main__":
    run_to_exit(lambda: typer.run(main))
