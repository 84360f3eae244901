"""Serves a folder by S3: versitygw's options, carried out by nanio."""

import argparse
import os
from pathlib import Path

import uvicorn
from nanio.app import build_app
from nanio.auth.credentials import StaticCredentialResolver
from nanio.config import Settings
from starlette.responses import PlainTextResponse

parser = argparse.ArgumentParser()
parser.add_argument("--port", required=True, help=":PORT")
parser.add_argument("--region", required=True)
parser.add_argument("--health", required=True, help="path that answers without a signature")
parser.add_argument("backend", choices=["posix"])
parser.add_argument("folder", type=Path)
options = parser.parse_args()
keys = StaticCredentialResolver({os.environ["ROOT_ACCESS_KEY"]: os.environ["ROOT_SECRET_KEY"]})
store = build_app(Settings(data_dir=options.folder, region=options.region, credentials=keys))


async def serve(scope, receive, send):
    """The store, and beside it the answer to a health check."""
    healthy = scope["type"] == "http" and scope["path"] == options.health
    await (PlainTextResponse("OK") if healthy else store)(scope, receive, send)


uvicorn.run(serve, host="0.0.0.0", port=int(options.port.removeprefix(":")), log_level="warning")
