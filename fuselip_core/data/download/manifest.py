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
    """`source` as for `fuselip data download`, its pinned version, and the licence of the data set as a whole."""

    source: str | None = None
    revision: str | None = None
    licence: str | None = None


def provenance_of(root: Path) -> Provenance:
    """The provenance in ``download.json`` in `root`, empty without one; raises DataError for an incomplete download."""
    for partial in chain(root.glob(".[!.]*.partial"), root.glob("*/.[!.]*.partial")):
        raise DataError(
            f"{root} has an incomplete download ({partial.name}); run `fuselip data download` again, which resumes it, "
            "or remove that file"
        )
    content = find_json(root / MANIFEST)
    stated = {name: content.get(name) for name in ("source", "revision", "licence")}
    return Provenance(**{name: value if isinstance(value, str) else None for name, value in stated.items()})


@dataclass(frozen=True)
class DownloadedFile:
    """A file below the target folder. checksum: as the host states it. sha256: computed here."""

    path: str
    size: int
    sha256: str
    checksum: str | None


@dataclass(frozen=True)
class DownloadManifest:
    """Content of ``download.json``, without times and machine names, so that equal downloads have equal manifests."""

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
    """The manifest of a complete download in `target`; None if there is none, or it is damaged."""
    content = find_json(target / MANIFEST)
    try:
        files = tuple(DownloadedFile(**file) for file in content.pop("files"))
        return DownloadManifest(files=files, **content)
    except (TypeError, KeyError):
        return None
