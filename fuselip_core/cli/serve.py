"""The verbs `serve` and `app`: a model and an index over HTTP, and a page on top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fuselip_core.errors import FuselipError
from fuselip_core.search import DEFAULT_INDEX

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder, hub id or models:/NAME@ALIAS; the index's own if left out."),
]
INDEX_HELP = "Index made by `fuselip index build`, a folder or an s3:// address."
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on.")]
KeyOption = Annotated[
    Path | None, typer.Option("--api-key-file", help="File with the key that every request must bring.")
]
UrlsOption = Annotated[
    bool, typer.Option("--allow-urls", help="Fetch images from public URLs that requests name; off by default.")
]

ObserveOption = Annotated[
    Path | None,
    typer.Option("--observe", help="Folder for vectors and lengths of all requests, which `fuselip monitor` reads."),
]


def serve(
    model: ModelOption = None,
    index: Annotated[str | None, typer.Option("--index", help=INDEX_HELP)] = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key_file: KeyOption = None,
    allow_urls: UrlsOption = False,
    observe: ObserveOption = None,
) -> None:
    """Serve embeddings, search and ranked answers over HTTP; /docs lists the requests."""
    from fuselip_core.serving.run import serve as run

    run(model, index, host, port, api_key_file, allow_urls, observe=observe)


def app(
    model: ModelOption = None,
    index: Annotated[str, typer.Option("--index", help=INDEX_HELP)] = DEFAULT_INDEX,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key_file: KeyOption = None,
    allow_urls: UrlsOption = False,
    local_names: Annotated[
        bool, typer.Option("--local-names", help="Answer to 127.0.0.1 and localhost alone, whatever --host is.")
    ] = False,
    compare_index: Annotated[
        str | None, typer.Option("--compare-index", help="Index of another model, whose hits are shown beside.")
    ] = None,
    compare_model: Annotated[
        str | None, typer.Option("--compare-model", help="That model; the one of --compare-index if left out.")
    ] = None,
    observe: ObserveOption = None,
) -> None:
    """Serve the same with a page to search on: http://127.0.0.1:8000."""
    from fuselip_core.serving.run import serve as run

    if compare_model and not compare_index:
        raise FuselipError("--compare-model needs the index that this model has built; name it with --compare-index")
    compared = (compare_model, compare_index) if compare_index else None
    run(
        model,
        index,
        host,
        port,
        api_key_file,
        allow_urls,
        page=True,
        compared=compared,
        local_names=local_names,
        observe=observe,
    )
