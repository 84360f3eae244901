"""Downloads a data set: lists it, checks disk space, fetches missing files, verifies them, writes ``download.json``.

`transfer.Fetch` downloads several files at a time. The Hub's client is used only for listing: against the tests'
server, `snapshot_download` (huggingface_hub 2.4) returned a damaged file under its final name, which
`verify_repo_checksums` detects only afterwards, logged signed URLs, and lost up to 10 MB with each broken connection.
Zenodo needs `Fetch` in any case. A second call on a complete folder verifies it without contacting the host.
"""

from __future__ import annotations

import fnmatch
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import Field

from fuselip_core.config import Section
from fuselip_core.data.download.hosts import Endpoints, Listing, Origin, list_files, origin_of, safe_path
from fuselip_core.data.download.manifest import MANIFEST, DownloadedFile, DownloadManifest, read_manifest
from fuselip_core.data.download.partial_file import Digests, RemoteFile, digests_of, partial_path, require_space
from fuselip_core.data.download.retries import DownloadError, Patience, public_url
from fuselip_core.data.download.transfer import Fetch
from fuselip_core.files import sha256_of, write_json
from fuselip_core.lock import sole_process
from fuselip_core.progress import ByteMeter

# Temporary names of files.atomic_write for notes and manifest: ``..<file>.partial.json.<process>.partial``.
DRAFT = re.compile(r"\.(\..+\.partial\.json|download\.json)\.\d+\.partial")
LOCK = ".download.lock"
# Libraries that log whole URLs, which may contain temporary signatures.
CHATTY_LOGGERS = ("httpx", "httpcore", "httpx2", "httpcore2")

logger = logging.getLogger("fuselip")


class DownloadSettings(Section):
    """Settings of a download."""

    revision: str | None = Field(
        default=None, description="Commit, branch or tag of a Hub data set; its main branch if empty."
    )
    include: tuple[str, ...] = Field(
        default=(), description="Globs of files to fetch; the data set's own choice if empty."
    )
    exclude: tuple[str, ...] = Field(default=(), description="Globs of files to leave out.")
    connections: int = Field(default=4, ge=1, le=32, description="Files fetched at once.")
    attempts: int = Field(default=6, ge=1, description="Consecutive failures without new data before giving up.")
    backoff_seconds: float = Field(default=1.0, ge=0, description="First wait after a failure; doubles each time.")
    longest_wait_seconds: float = Field(default=300.0, gt=0, description="Longest wait before another attempt.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Seconds without data from the host.")
    verify: Literal["quick", "full"] = Field(
        default="quick", description="How to verify existing files: size, or checksum as well."
    )
    refresh: bool = Field(default=False, description="Ask the host even if the download is complete.")
    hub_endpoint: str | None = Field(default=None, description="Base address of the Hub; HF_ENDPOINT's if empty.")
    zenodo_endpoint: str | None = Field(default=None, description="Base address of Zenodo; ZENODO_ENDPOINT's if empty.")


def download(source: str, target: Path, settings: DownloadSettings | None = None) -> DownloadManifest:
    """Downloads the files of `source` into `target` and returns the manifest, also written to ``target/download.json``.

    `source` is a name from ``origins.json``, ``hub:OWNER/NAME[@REVISION]``, ``zenodo:RECORD`` or a URL. Raises
    DownloadError with the remedy; the next call resumes.
    """
    settings = settings or DownloadSettings()
    origin = origin_of(source)
    with _locked(target), _quiet_libraries():
        present = None if settings.refresh else _complete(target, origin, settings)
        if present is None:
            _sweep(target)
        return present or _fetch_all(origin, target, settings)


def _sweep(target: Path) -> None:
    """Deletes temporary notes of a killed process, but no partial files."""
    for path in target.rglob(".*.partial"):
        if DRAFT.fullmatch(path.name):
            path.unlink()


def _complete(target: Path, origin: Origin, settings: DownloadSettings) -> DownloadManifest | None:
    """The manifest in `target`, if it belongs to the same request and all its files are unchanged."""
    manifest = read_manifest(target)
    if manifest is None or manifest.requested != _requested(origin, settings):
        return None
    for file in manifest.files:
        path = target / safe_path(file.path)
        if not path.is_file() or path.stat().st_size != file.size:
            return None
        if settings.verify == "full" and sha256_of(path) != file.sha256:
            logger.warning("%s has changed since it was downloaded; fetching it again", path)
            return None
    logger.info(
        "%s: all %d files are there, their %s checked",
        target,
        len(manifest.files),
        "checksums" if settings.verify == "full" else "sizes",
    )
    return manifest


def _requested(origin: Origin, settings: DownloadSettings) -> dict[str, Any]:
    """The parameters that identify a download, with the URL's secrets removed."""
    plain = public_url(origin.source) if "://" in origin.source else origin.source
    include = settings.include or origin.include
    return {
        "source": plain,
        "revision": settings.revision,
        "include": list(include),
        "exclude": list(settings.exclude),
    }


def _fetch_all(origin: Origin, target: Path, settings: DownloadSettings) -> DownloadManifest:
    patience = Patience(settings.attempts, settings.backoff_seconds, settings.longest_wait_seconds)
    endpoints = Endpoints.configured(settings.hub_endpoint, settings.zenodo_endpoint, settings.timeout_seconds)
    with _client(settings) as client:
        listing = list_files(origin.source, settings.revision, client, endpoints, patience)
        wanted = _wanted(listing, settings.include or origin.include, settings.exclude)
        present = _present(wanted, target)
        missing = [file for file in wanted if file.path not in present]
        require_space(target, _bytes_to_come(missing, target), listing.access.what)
        fetched = _fetch_missing(missing, target, listing, client, patience, settings.connections)
    digests = {**present, **fetched}
    manifest = DownloadManifest(
        source=listing.source,
        revision=listing.revision,
        licence=listing.licence,
        page=listing.access.page,
        requested=_requested(origin, settings),
        files=tuple(
            DownloadedFile(file.path, (target / file.path).stat().st_size, digests[file.path].sha256, file.checksum)
            for file in wanted
        ),
    )
    write_json(target / MANIFEST, asdict(manifest))
    return manifest


def _client(settings: DownloadSettings) -> httpx.Client:
    timeout = httpx.Timeout(settings.timeout_seconds, connect=min(20.0, settings.timeout_seconds))
    return httpx.Client(timeout=timeout, follow_redirects=True, headers={"User-Agent": "fuselip-rocov2"})


def _wanted(listing: Listing, include: tuple[str, ...], exclude: tuple[str, ...]) -> list[RemoteFile]:
    """The files to fetch, by path; raises DownloadError if the globs leave none or a path leaves the folder."""
    wanted = {
        str(safe_path(file.path)): file
        for file in listing.files
        if (not include or _matches(file.path, include)) and not _matches(file.path, exclude)
    }
    if not wanted:
        raise DownloadError(
            f"{listing.access.what} has {len(listing.files)} files, but none that matches {', '.join(include) or '*'}; "
            f"see {listing.access.page}"
        )
    clash = sorted(path for path in wanted if Path(path).name == MANIFEST and "/" not in path)
    if clash:
        raise DownloadError(f"{listing.access.what} has a file {MANIFEST}, the manifest's name; exclude it")
    return [wanted[path] for path in sorted(wanted)]


def _matches(path: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def _present(wanted: list[RemoteFile], target: Path) -> dict[str, Digests]:
    """Digests of existing files that match the listing; files with neither size nor checksum are fetched again."""
    present = {}
    for file in wanted:
        path = target / file.path
        if not path.is_file() or (file.size is None and file.checksum is None):
            continue
        if file.size is not None and path.stat().st_size != file.size:
            logger.warning("%s differs in size from what its host lists; fetching it again", path)
            continue
        digests = digests_of(path, file)
        if digests.match:
            present[file.path] = digests
        else:
            logger.warning("%s differs in checksum from what its host lists; fetching it again", path)
    return present


def _bytes_to_come(missing: list[RemoteFile], target: Path) -> int:
    total = 0
    for file in missing:
        partial = partial_path(target / file.path)
        total += max(0, (file.size or 0) - (partial.stat().st_size if partial.exists() else 0))
    return total


def _fetch_missing(
    missing: list[RemoteFile],
    target: Path,
    listing: Listing,
    client: httpx.Client,
    patience: Patience,
    connections: int,
) -> dict[str, Digests]:
    """Fetches in `connections` threads; the first failure stops the others and is raised."""
    stop = threading.Event()
    # Wakes threads that wait for their next attempt when the download is stopped.
    patience = replace(patience, sleep=stop.wait)
    total = sum(file.size or 0 for file in missing)
    with ExitStack() as stack:
        meter = stack.enter_context(ByteMeter(f"download {listing.access.what}", total or None))
        pool = stack.enter_context(ThreadPoolExecutor(connections, thread_name_prefix="download"))
        # Called before the pool waits for its threads, also if this thread is interrupted.
        stack.callback(stop.set)
        futures = {
            pool.submit(
                Fetch(client, file, target / file.path, listing.access, patience, meter, stop.is_set).run
            ): file.path
            for file in missing
        }
        fetched = {}
        try:
            for future in as_completed(futures):
                fetched[futures[future]] = future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return fetched


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Lets only one process download into a folder; removes a new folder again if nothing was downloaded."""
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{target} cannot be created ({error.strerror}); choose another folder") from None
    try:
        busy = DownloadError(f"another process is downloading into {target}; wait for it or end it")
        with sole_process(target / LOCK, busy):
            yield
    except BaseException:
        with suppress(OSError):  # not empty
            if made:
                target.rmdir()
        raise


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps signed URLs out of the log during a download."""
    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [library.level for library in loggers]
    for library in loggers:
        library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for library, level in zip(loggers, levels, strict=True):
            library.setLevel(level)
