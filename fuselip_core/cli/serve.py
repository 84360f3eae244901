"""The commands `serve` and `app`: a model and an index over HTTP, without and with a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fuselip_core.errors import FuselipError
from fuselip_core.search import DEFAULT_INDEX

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder, hub id or models:/NAME@ALIAS; default: the index's."),
]
INDEX_HELP = "Index made by `fuselip index build`, a folder or an s3:// address."
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on.")]
KeyOption = Annotated[
    Path | None, typer.Option("--api-key-file", help="File with the API key that requests must send.")
]
UrlsOption = Annotated[bool, typer.Option("--allow-urls", help="Fetch images from public URLs in requests.")]

ObserveOption = Annotated[
    Path | None,
    typer.Option("--observe", help="Folder for vectors and lengths of all requests, for `fuselip monitor`."),
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
    """Serve embeddings, search and ranked answers over HTTP; see /docs."""
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
        bool, typer.Option("--local-names", help="Answer only to 127.0.0.1 and localhost, whatever --host is.")
    ] = False,
    compare_index: Annotated[
        str | None, typer.Option("--compare-index", help="Index of a second model, whose hits are shown side by side.")
    ] = None,
    compare_model: Annotated[
        str | None, typer.Option("--compare-model", help="The second model; default: that of --compare-index.")
    ] = None,
    observe: ObserveOption = None,
) -> None:
    """Serve the same with a search page at http://127.0.0.1:8000."""
    from fuselip_core.serving.run import serve as run

    if compare_model and not compare_index:
        raise FuselipError("--compare-model needs the index that it built; name it with --compare-index")
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
