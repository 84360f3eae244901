"""Studies of a DICOMweb server (PS3.18: QIDO-RS, WADO-RS) as DICOM files in a folder, where `data/dicom` reads them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tenacity

from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_folder
from fuselip_core.progress import track

STUDY_UID = "0020000D"
UID = re.compile(r"[0-9.]{1,64}")  # of which a path is made
PAGE = 500
ATTEMPTS = 5
SECONDS = 60.0  # without a byte from the server


def is_address(source: str | Path) -> bool:
    """Whether a source is the address of a server."""
    return str(source).startswith(("http://", "https://"))


def study_address(url: str, file: Path) -> str:
    """The address of the study that `fetch_studies` took a file from."""
    return f"{url.rstrip('/')}/studies/{file.parent.name}"


def fetch_studies(url: str, folder: Path) -> None:
    """Writes the instances of every study at `url` to `folder`/<study UID>/; a study that is there is not asked again.

    User and password come from ~/.netrc. Raises FuselipError where the server does not answer as DICOMweb.
    """
    import requests

    if "@" in urlsplit(url).netloc:
        raise FuselipError("the address holds a user or password, which would be shown; put them into ~/.netrc")
    client = _client(url)
    again = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(max=20),
        retry=tenacity.retry_if_exception_type((requests.ConnectionError, requests.Timeout)),
        reraise=True,
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        found = again(_study_uids, client)
        if not found:
            raise FuselipError(f"the DICOMweb server at {url} has no studies that this user may see")
        for uid in track(found, "fetch studies"):
            if not (folder / uid).is_dir():
                again(_fetch, client, uid, folder / uid)
    except FuselipError:
        raise
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise FuselipError(
            f"the DICOMweb server at {url} answers {status}; check the address, and user and password in ~/.netrc"
        ) from None  # its own words name the study
    except requests.RequestException as error:
        raise FuselipError(f"no DICOMweb server answers at {url} ({type(error).__name__}); check the address") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise FuselipError(
            f"what answers at {url} is no DICOMweb server ({type(error).__name__}); Orthanc's ends in /dicom-web"
        ) from None


def _client(url: str) -> Any:
    import requests
    from dicomweb_client.api import DICOMwebClient

    try:
        client = DICOMwebClient(url.rstrip("/"), session=requests.Session(), timeout=SECONDS)
    except ValueError:
        raise FuselipError(f"{url} is no address of a DICOMweb server; give one as https://host/dicom-web") from None
    client.set_http_retry_params(max_attempts=ATTEMPTS)
    return client


def _study_uids(client: Any) -> list[str]:
    uids: list[str] = []
    while True:
        page = client.search_for_studies(limit=PAGE, offset=len(uids), fields=[STUDY_UID])
        uids += [study[STUDY_UID]["Value"][0] for study in page]
        if len(page) < PAGE:
            return sorted({uid for uid in uids if UID.fullmatch(uid)})


def _fetch(client: Any, uid: str, folder: Path) -> None:
    with atomic_folder(folder) as partial:
        for number, dataset in enumerate(client.iter_study(uid)):
            path = partial / f"{number:06d}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            os.utime(path, (0, 0))  # fetched again, the file is the same
