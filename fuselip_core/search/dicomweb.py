"""Downloads the studies of a DICOMweb server (PS3.18: QIDO-RS, WADO-RS) as DICOM files, which `data/dicom` reads."""

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
UID = re.compile(r"[0-9.]{1,64}")  # anything else must not become a folder's name
PAGE = 500
ATTEMPTS, WAIT = 5, tenacity.wait_exponential(max=20)
BUSY = (408, 429, 502, 503, 504)
SECONDS = 60.0  # without a byte from the server


def is_address(source: str | Path) -> bool:
    """Whether a source is a server's address, not a folder."""
    return str(source).startswith(("http://", "https://"))


def study_address(url: str, file: Path) -> str:
    """The address of the study that `file` belongs to."""
    return f"{url.rstrip('/')}/studies/{file.parent.name}"


def fetch_studies(url: str, folder: Path) -> None:
    """Writes every study at `url` to `folder`/<study UID>/, and skips studies that are already there.

    User and password come from ~/.netrc. Raises FuselipError if the server does not answer, or not as DICOMweb.
    """
    import requests

    if "@" in urlsplit(url).netloc:
        raise FuselipError("the address contains a user or password, which logs would show; put them into ~/.netrc")
    client = _client(url)
    again = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS), wait=WAIT, retry=tenacity.retry_if_exception(_passes), reraise=True
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
        remedy = "try again later" if status in BUSY else "check the address, and user and password in ~/.netrc"
        # From None, since the error quotes the study's address.
        raise FuselipError(f"the DICOMweb server at {url} answers {status}; {remedy}") from None
    except requests.RequestException as error:
        raise FuselipError(f"no DICOMweb server answers at {url} ({type(error).__name__}); check the address") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise FuselipError(
            f"the server at {url} does not speak DICOMweb ({type(error).__name__}); check the address, which for "
            "Orthanc ends in /dicom-web"
        ) from None


def _passes(error: BaseException) -> bool:
    """Whether a second try may succeed: the connection broke, also in the middle of a study, or the server is busy."""
    import requests

    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in BUSY
    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, broken)


def _client(url: str) -> Any:
    import requests
    from dicomweb_client.api import DICOMwebClient

    try:
        client = DICOMwebClient(url.rstrip("/"), session=requests.Session(), timeout=SECONDS)
    except ValueError:
        raise FuselipError(f"{url} is no DICOMweb address; give one such as https://host/dicom-web") from None
    client.set_http_retry_params(retry=False)  # fetch_studies retries, which covers a study that breaks off as well
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
            os.utime(path, (0, 0))  # so that a second download counts as unchanged
