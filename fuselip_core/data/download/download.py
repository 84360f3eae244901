"""Downloads a data set: lists it, checks disk space, fetches missing files, verifies them, writes ``download.json``.

Files come in a few connections at once through `transfer.Fetch`. The Hub's own client only lists: tried against the
tests' server, `snapshot_download` (huggingface_hub 2.4) returned a damaged file under its final name, which
`verify_repo_checksums` finds only afterwards; logged signed addresses; and lost up to 10 MB at each cut. Zenodo would
need `Fetch` all the same. A second call on a complete folder verifies it and asks no host.
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

# Notes are written beside, then renamed (files.atomic_write): ``..<file>.partial.json.<process>.partial``.
DRAFT = re.compile(r"\.(\..+\.partial\.json|download\.json)\.\d+\.partial")
LOCK = ".download.lock"
# Libraries that log whole addresses, which carry signatures of temporary access.
CHATTY_LOGGERS = ("httpx", "httpcore", "httpx2", "httpcore2")

logger = logging.getLogger("fuselip")


class DownloadSettings(Section):
    """How a data set is fetched."""

    revision: str | None = Field(
        default=None, description="Commit, branch or tag of a Hub data set; its main branch if empty."
    )
    include: tuple[str, ...] = Field(
        default=(), description="Globs of files to fetch; the data set's own choice if empty."
    )
    exclude: tuple[str, ...] = Field(default=(), description="Globs of files to leave out.")
    connections: int = Field(default=4, ge=1, le=32, description="Files fetched at once.")
    attempts: int = Field(default=6, ge=1, description="Failures in a row, without a new byte, before giving up.")
    backoff_seconds: float = Field(default=1.0, ge=0, description="First wait after a failure; it doubles from there.")
    longest_wait_seconds: float = Field(default=300.0, gt=0, description="Longest wait before another attempt.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Longest silence of a host.")
    verify: Literal["quick", "full"] = Field(
        default="quick", description="Present files: sizes only, or checksums as well."
    )
    refresh: bool = Field(default=False, description="Ask the host again although everything is there.")
    hub_endpoint: str | None = Field(default=None, description="Base address of the Hub; HF_ENDPOINT's if empty.")
    zenodo_endpoint: str | None = Field(default=None, description="Base address of Zenodo; ZENODO_ENDPOINT's if empty.")


def download(source: str, target: Path, settings: DownloadSettings | None = None) -> DownloadManifest:
    """Brings the files of `source` into `target` and returns the manifest, also written to ``target/download.json``.

    `source` is a name of ``origins.json``, ``hub:OWNER/NAME[@REVISION]``, ``zenodo:RECORD`` or an address. Raises
    DownloadError with the remedy; what has arrived is kept, and the next call resumes from it.
    """
    settings = settings or DownloadSettings()
    origin = origin_of(source)
    with _locked(target), _quiet_libraries():
        present = None if settings.refresh else _complete(target, origin, settings)
        if present is None:
            _sweep(target)
        return present or _fetch_all(origin, target, settings)


def _sweep(target: Path) -> None:
    """Deletes the unfinished notes of a killed process; partial files stay."""
    for path in target.rglob(".*.partial"):
        if DRAFT.fullmatch(path.name):
            path.unlink()


def _complete(target: Path, origin: Origin, settings: DownloadSettings) -> DownloadManifest | None:
    """The manifest in `target` if it answers this request and every file of it is there as it was."""
    manifest = read_manifest(target)
    if manifest is None or manifest.requested != _requested(origin, settings):
        return None
    for file in manifest.files:
        path = target / safe_path(file.path)
        if not path.is_file() or path.stat().st_size != file.size:
            return None
        if settings.verify == "full" and sha256_of(path) != file.sha256:
            logger.warning("%s has changed since it was downloaded; it is fetched again", path)
            return None
    logger.info(
        "%s: all %d files are there, their %s checked",
        target,
        len(manifest.files),
        "checksums" if settings.verify == "full" else "sizes",
    )
    return manifest


def _requested(origin: Origin, settings: DownloadSettings) -> dict[str, Any]:
    """What makes two downloads the same; the address without what may be secret."""
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
        files=tuple(_downloaded(file, target, digests[file.path]) for file in wanted),
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
            f"{listing.access.what} lists {len(listing.files)} files, of which none fits "
            f"{', '.join(include) or '*'}; see {listing.access.page}"
        )
    clash = sorted(path for path in wanted if Path(path).name == MANIFEST and "/" not in path)
    if clash:
        raise DownloadError(f"{listing.access.what} holds a file named {MANIFEST}, the manifest's name; leave it out")
    return [wanted[path] for path in sorted(wanted)]


def _matches(path: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def _present(wanted: list[RemoteFile], target: Path) -> dict[str, Digests]:
    """Digests of the files that are there, whole and as listed; a file that nothing vouches for is fetched again."""
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


def _downloaded(file: RemoteFile, target: Path, digests: Digests) -> DownloadedFile:
    return DownloadedFile(file.path, (target / file.path).stat().st_size, digests.sha256, file.checksum)


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
    # A thread that waits for its next attempt wakes up as soon as the download is given up.
    patience = replace(patience, sleep=stop.wait)
    total = sum(file.size or 0 for file in missing)
    with ExitStack() as stack:
        meter = stack.enter_context(ByteMeter(f"download {listing.access.what}", total or None))
        pool = stack.enter_context(ThreadPoolExecutor(connections, thread_name_prefix="download"))
        # Runs before the pool waits for its threads, also when this thread is interrupted.
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
    """Only one process downloads into a folder; the lock goes with the process, however it ends."""
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{target} cannot be made ({error.strerror}); choose another folder") from None
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
    """Keeps addresses with signatures out of the log while a download runs."""
    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [library.level for library in loggers]
    for library in loggers:
        library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for library, level in zip(loggers, levels, strict=True):
            library.setLevel(level)
