"""Lists the files of a data set on its host: Hugging Face, Zenodo, or a single URL.

A source is ``hub:OWNER/NAME[@REVISION]``, ``zenodo:RECORD``, ``https://…/file[#sha256=…]``, or a name from
``origins.json``. Listing pins the revision, so that all files of a download belong to one version.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx

from fuselip_core.data.download.partial_file import RemoteFile
from fuselip_core.data.download.retries import (
    RETRY_STATUS,
    Access,
    DownloadError,
    Patience,
    TransientError,
    network_errors,
    no_access,
    persist,
    public_url,
    refuse_status,
    retry_after,
)
from fuselip_core.files import read_json

ORIGINS = Path(__file__).with_name("origins.json")
HUB_TOKEN, ZENODO_TOKEN = "HF_TOKEN", "ZENODO_TOKEN"
ZENODO = "https://zenodo.org"


@dataclass(frozen=True)
class Endpoints:
    """Base URLs of the hosts or their mirrors, and the timeout in seconds."""

    hub: str
    zenodo: str
    timeout: float = 60.0

    @classmethod
    def configured(cls, hub: str | None, zenodo: str | None, timeout: float) -> Endpoints:
        """The given URLs, or else those of HF_ENDPOINT and ZENODO_ENDPOINT, or else the public ones."""
        from huggingface_hub import constants

        addresses = {
            "HF_ENDPOINT": hub or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT,
            "ZENODO_ENDPOINT": zenodo or os.environ.get("ZENODO_ENDPOINT") or ZENODO,
        }
        for variable, address in addresses.items():
            if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
                raise DownloadError(f"{variable} is '{address}', which is not a URL; write https://HOST, or unset it")
        return cls(addresses["HF_ENDPOINT"].rstrip("/"), addresses["ZENODO_ENDPOINT"].rstrip("/"), timeout)


@dataclass(frozen=True)
class Listing:
    """All files of one version of a data set. `revision`: a commit (Hub), a record (Zenodo) or None."""

    source: str
    revision: str | None
    licence: str | None
    access: Access
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Origin:
    """A named data set: its source, and globs of the files that are needed (all if empty)."""

    source: str
    include: tuple[str, ...] = ()
    note: str = ""


def origins() -> dict[str, Origin]:
    """The named data sets."""
    return {
        name: Origin(entry["source"], tuple(entry.get("include", ())), entry.get("note", ""))
        for name, entry in read_json(ORIGINS).items()
    }


def origin_of(source: str) -> Origin:
    """The origin of a name or source; raises DownloadError for anything else."""
    named = origins()
    if source in named:
        return named[source]
    if source.startswith(("hub:", "zenodo:", "https://", "http://")):
        return Origin(source)
    raise DownloadError(
        f"unknown data set '{source}'; name one of {', '.join(named)}, or write hub:OWNER/NAME, zenodo:RECORD or "
        "https://…"
    )


def folder_name_of(source: str) -> str:
    """The default folder for downloading `source`: its name, without query or other parts of a URL."""
    if source.startswith(("https://", "http://")):
        name = PurePosixPath(unquote(urlsplit(source).path)).stem
    else:
        name = source.partition("@")[0].rpartition(":")[2].rpartition("/")[2]
    return name if name.strip(".") else "download"


def list_files(
    source: str, revision: str | None, client: httpx.Client, endpoints: Endpoints, patience: Patience
) -> Listing:
    """Lists the files of an Origin's `source`; raises DownloadError that names the page or variable to look at."""
    kind, _, rest = source.partition(":")
    if kind == "hub":
        name, _, given = rest.partition("@")
        return _list_hub(name, revision or given or None, endpoints, patience)
    if revision is not None:
        raise DownloadError(f"{public_url(source)} has no revisions; leave the revision out")
    if kind == "zenodo":
        return _list_zenodo(rest, client, endpoints, patience)
    return _list_address(source)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def _list_hub(name: str, revision: str | None, endpoints: Endpoints, patience: Patience) -> Listing:
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DownloadError(f"'{name}' is not the name of a data set on the Hub; write hub:OWNER/NAME")
    token = get_token()
    page = f"{endpoints.hub}/datasets/{name}"
    access = Access(
        f"data set {name}", page, HUB_TOKEN, endpoints.hub, {"Authorization": f"Bearer {token}"} if token else {}
    )
    api = HfApi(endpoint=endpoints.hub, token=token or False, library_name="fuselip-rocov2")

    def ask() -> Listing:
        with _hub_errors(access, revision):
            info = api.dataset_info(name, revision=revision, timeout=endpoints.timeout)
            tree = api.list_repo_tree(name, repo_type="dataset", revision=info.sha, recursive=True)
            files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return Listing(
            source=f"hub:{name}",
            revision=info.sha,
            licence=_card_licence(info),
            access=access,
            files=tuple(
                RemoteFile(
                    entry.path,
                    hf_hub_url(name, entry.path, repo_type="dataset", revision=info.sha, endpoint=endpoints.hub),
                    entry.size,
                    f"sha256:{entry.lfs.sha256}" if entry.lfs else f"gitsha1:{entry.blob_id}",
                )
                for entry in files
            ),
        )

    return persist(ask, patience, access.what)


def _card_licence(info: Any) -> str | None:
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license")
    return ", ".join(licence) if isinstance(licence, list) else licence


@contextmanager
def _hub_errors(access: Access, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(no_access(access, error.response.status_code)) from None
    except RepositoryNotFoundError:
        raise DownloadError(
            f"{access.what} does not exist at {access.origin}, or is private; check its name, or set {HUB_TOKEN} to a "
            "token that may read it"
        ) from None
    except RevisionNotFoundError:
        raise DownloadError(f"{access.what} has no revision '{revision}'; see {access.page}/commits/main") from None
    except HFValidationError:
        raise DownloadError(f"{access.what} has a name that the Hub does not allow; write hub:OWNER/NAME") from None
    except OfflineModeIsEnabled:
        raise DownloadError(f"{access.what} cannot be listed in offline mode; unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in RETRY_STATUS:
            raise TransientError(
                f"the Hub answered {status}", retry_after=retry_after(error.response.headers)
            ) from None
        if status in (401, 403):
            raise DownloadError(no_access(access, status)) from None
        raise DownloadError(f"the Hub answered {status} for {access.what}; see {access.page}") from None
    except Exception as error:
        # Errors of huggingface_hub's HTTP library, httpx in some releases and httpx2 in others.
        if not type(error).__module__.startswith("httpx") and not isinstance(error, TimeoutError | ConnectionError):
            raise
        raise TransientError(f"connection to {access.origin} failed ({type(error).__name__})") from None


# ---- Zenodo ----------------------------------------------------------------------------------------------------------


def _list_zenodo(record: str, client: httpx.Client, endpoints: Endpoints, patience: Patience) -> Listing:
    if not record.isdigit():
        raise DownloadError(f"'{record}' is not a Zenodo record; write zenodo:NUMBER, for example zenodo:10821435")
    token = os.environ.get(ZENODO_TOKEN)
    access = Access(
        f"Zenodo record {record}",
        f"{endpoints.zenodo}/records/{record}",
        ZENODO_TOKEN,
        endpoints.zenodo,
        {"Authorization": f"Bearer {token}"} if token else {},
    )
    url = f"{endpoints.zenodo}/api/records/{record}"
    content = persist(lambda: _ask_json(client, url, access), patience, access.what)
    return _zenodo_listing(content, access)


def _ask_json(client: httpx.Client, url: str, access: Access) -> Mapping[str, Any]:
    with network_errors(urlsplit(url).hostname or url):
        response = client.get(url, headers={"Accept": "application/json", **access.headers_for(url)})
    refuse_status(response, access)
    try:
        content = response.json()
    except ValueError:
        raise TransientError(f"{response.url.host} did not answer with JSON") from None
    if not isinstance(content, dict):
        raise DownloadError(f"{response.url.host} did not answer with a record for {access.what}; see {access.page}")
    return content


def _zenodo_listing(content: Mapping[str, Any], access: Access) -> Listing:
    metadata = content.get("metadata") or {}
    files = content.get("files") or []
    if not files:
        raise DownloadError(
            f"{access.what} shows no files (access: {metadata.get('access_right', 'unknown')}); request access on "
            f"{access.page} and set {ZENODO_TOKEN} to a token of the account that has it"
        )
    try:
        listed = tuple(
            RemoteFile(entry["key"], entry["links"]["self"], int(entry["size"]), entry["checksum"]) for entry in files
        )
    except (KeyError, TypeError, ValueError):
        raise DownloadError(f"the file list of {access.what} has an unknown format; see {access.page}") from None
    return Listing(
        source=f"zenodo:{content.get('id', access.what.split()[-1])}",
        revision=str(content.get("id", "")) or None,
        licence=(metadata.get("license") or {}).get("id"),
        access=access,
        files=listed,
    )


# ---- a single URL ----------------------------------------------------------------------------------------------------


def _list_address(source: str) -> Listing:
    """``https://host/path/file#sha256=…`` (or md5): one file of unknown size."""
    parts = urlsplit(source)
    name = unquote(PurePosixPath(parts.path).name)
    if not parts.hostname or not name:
        raise DownloadError(f"{public_url(source)} names no file; write a URL that ends in a file name")
    checksum = None
    if parts.fragment:
        kind, _, digest = parts.fragment.partition("=")
        lengths = {"sha256": 64, "md5": 32}
        if not re.fullmatch(r"[0-9a-fA-F]*", digest) or lengths.get(kind) != len(digest):
            raise DownloadError(f"'#{parts.fragment}' is not a checksum; write #sha256=… or #md5=… in hexadecimal")
        checksum = f"{kind}:{digest.lower()}"
    url = parts._replace(fragment="").geturl()
    access = Access(name, public_url(source))
    return Listing(public_url(source), None, None, access, (RemoteFile(name, url, None, checksum),))


def safe_path(path: str) -> PurePosixPath:
    """A path from a host, if it stays within the target folder; raises DownloadError otherwise."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path or "\0" in path:
        raise DownloadError(f"the host lists the file {quote(path)}, whose path leaves the target folder; exclude it")
    return pure
