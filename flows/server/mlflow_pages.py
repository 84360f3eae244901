"""MLflow's own servers on this machine: ``make serve-ui`` (curves and models) and ``make serve-model``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.server.ports import mlflow_page, require_free
from flows.server.stack import HOST
from fuselip_core.errors import FuselipError, run_to_exit
from fuselip_core.tracking.store import prepare_store, tracking_uri

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port of the page.")] = 5000) -> None:
    """Show curves and models."""
    if page := mlflow_page(Path(os.environ["PREFECT_HOME"])):
        raise FuselipError(f"`make serve-flows` shows this page already: open {page}")
    require_free(port, f"make serve-ui PORT={port + 1}")
    typer.echo(f"curves and models: http://{HOST}:{port} (Ctrl-C ends it)")
    _become("ui", "--backend-store-uri", tracking_uri(), "--host", HOST, "--port", str(port), "--workers", "1")


@app.command()
def model(
    uri: Annotated[str, typer.Argument(help="Registered model, such as models:/fuselip-sample@champion.")],
    port: Annotated[int, typer.Option(help="Port of the model server.")] = 5001,
) -> None:
    """Serve a registered model: POST its inputs to /invocations."""
    require_free(port, f"make serve-model MODEL={uri} PORT={port + 1}")
    typer.echo(f"{uri}: http://{HOST}:{port}/invocations once it is loaded (Ctrl-C ends it)")
    _become("models", "serve", "--model-uri", uri, "--env-manager", "local", "--host", HOST, "--port", str(port))


def _become(*arguments: str) -> None:
    """Turns this process into MLflow's, which finds the environment's own programs first."""
    prepare_store(tracking_uri())
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "MLFLOW_TRACKING_URI": tracking_uri(),
        # A page of curves and models needs none of the ten processes that judge language models.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", *arguments], environment)  # noqa: S606


if __name__ == "__main__":
    run_to_exit(app)
