"""``download.json``: source, revision, licence and checksums of a raw data set."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fuselip_core.data.pair import DataError
from fuselip_core.files import find_json

MANIFEST = "download.json"


@dataclass(frozen=True)
class Provenance:
    """`source` as `fuselip data download` takes it, the version that its host pinned, and the licence of the whole."""

    source: str | None = None
    revision: str | None = None
    licence: str | None = None


def provenance_of(root: Path) -> Provenance:
    """What ``download.json`` in `root` says, nothing without one; raises DataError for an unfinished download."""
    for partial in chain(root.glob(".[!.]*.partial"), root.glob("*/.[!.]*.partial")):
        raise DataError(
            f"{root} has an unfinished download ({partial.name}); run `fuselip data download` again, which goes on "
            "with it, or remove that file"
        )
    content = find_json(root / MANIFEST)
    stated = {name: content.get(name) for name in ("source", "revision", "licence")}
    return Provenance(**{name: value if isinstance(value, str) else None for name, value in stated.items()})


@dataclass(frozen=True)
class DownloadedFile:
    """A file below the target folder. `checksum` is what its host stated, `sha256` what was read here."""

    path: str
    size: int
    sha256: str
    checksum: str | None


@dataclass(frozen=True)
class DownloadManifest:
    """What ``download.json`` holds; no times and no machine names, so equal downloads have equal manifests."""

    source: str
    revision: str | None
    licence: str | None
    page: str
    requested: dict[str, Any]
    files: tuple[DownloadedFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def read_manifest(target: Path) -> DownloadManifest | None:
    """The manifest of a finished download in `target`; None if there is none that can be read."""
    content = find_json(target / MANIFEST)
    try:
        files = tuple(DownloadedFile(**file) for file in content.pop("files"))
        return DownloadManifest(files=files, **content)
    except (TypeError, KeyError):
        return None
