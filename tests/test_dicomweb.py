"""An index of the studies on a DICOMweb server: Orthanc's, from Debian's packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tenacity
from make_dicom import SECRETS, save, with_identities
from needs import missing
from prefect_stack import free_port, wait_until
from stand_in_embedder import StandIn

from fuselip_core.errors import FuselipError
from fuselip_core.search import build, dicomweb
from fuselip_core.search.index import Index

EMBEDDER: Any = StandIn()
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an Orthanc with three pictures of two patients, one of them with burned-in text."""
    program = shutil.which("Orthanc")
    if not program or not PLUGIN.exists():
        missing("needs Orthanc (Debian's packages orthanc and orthanc-dicomweb)")
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    settings = {
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: server.poll() is not None or _answers(address), "the start of Orthanc", 120)
        assert server.poll() is None, (folder / "log").read_text()
        for number in range(3):
            post(address, number)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/system").status_code == 200
    except httpx.HTTPError:
        return False


def post(address: str, number: int) -> None:
    values = np.random.default_rng(number).integers(0, 4000, (16, 16), dtype=np.uint16)
    changes = {"PatientID": f"MRN-{number % 2}"} | ({"BurnedInAnnotation": "YES"} if number == 2 else {})
    path = save(with_identities(values, **changes), Path("/dev/shm") / f"fuselip-{free_port()}.dcm")
    try:
        httpx.post(f"{address}/instances", content=path.read_bytes()).raise_for_status()
    finally:
        path.unlink()


def test_studies_are_indexed_and_hits_lead_to_them(
    orthanc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSELIP_PSEUDONYM_KEY", "k" * 32)
    address, folder = f"{orthanc}/dicom-web", tmp_path / "index"
    outcome = build.build(address, folder, EMBEDDER)
    assert outcome.rows == 2 and outcome.set_aside == {"burned_in_text": 1}
    index = Index.open(folder)
    hits = index.search(np.ones(index.width, np.float32))
    assert len({hit.case for hit in hits}) == 2 and {hit.modality for hit in hits} == {"CT"}
    for hit in hits:
        assert hit.place.startswith(f"{address}/studies/")
        found = httpx.get(f"{hit.place}/metadata", headers={"Accept": "application/dicom+json"}).json()
        assert found[0]["00080060"]["Value"] == ["CT"]
    # Nobody's name is in the index, and what was fetched is gone.
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (*SECRETS.values(), "MRN-", "Mustermann"):
        assert secret.encode() not in written
    assert not (tmp_path / ".index.studies").exists()
    assert build.add(address, folder, EMBEDDER).unchanged == 2
    post(orthanc, 3)
    outcome = build.add(address, folder, EMBEDDER)
    assert (outcome.rows, outcome.unchanged) == (1, 2)


@contextmanager
def broken(orthanc: str, failures: list[int]) -> Iterator[str]:
    """A server before Orthanc that first answers with these statuses; 0 breaks the connection."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if failures and (status := failures.pop(0)) != 200:
                if status:
                    self.send_error(status)
                self.close_connection = True
                return
            found = httpx.get(f"{orthanc}{self.path}", headers={"Accept": self.headers["Accept"]})
            self.send_response(found.status_code)
            self.send_header("Content-Type", found.headers["Content-Type"])
            self.send_header("Content-Length", str(len(found.content)))
            self.end_headers()
            self.wfile.write(found.content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_server_that_stumbles_is_asked_again(orthanc: str, tmp_path: Path) -> None:
    failures = [503, 0, 200, 0, 503]
    with broken(orthanc, failures) as address:
        dicomweb.fetch_studies(f"{address}/dicom-web", tmp_path / "studies")
    assert not failures and len(list((tmp_path / "studies").glob("*/*.dcm"))) >= 3


def test_what_is_no_dicomweb_server_is_one_sentence(orthanc: str, tmp_path: Path) -> None:
    for address, said in (
        (f"{orthanc}/nothing", "answers 404"),
        (f"{orthanc}/app", "does not speak DICOMweb|answers 404"),
        ("http://127.0.0.1:9/dicom-web", "no DICOMweb server answers"),
        ("http://somebody:secret@127.0.0.1/dicom-web", "netrc"),
    ):
        with pytest.raises(FuselipError, match=said) as caught:
            build.build(address, tmp_path / "index", EMBEDDER)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "index").exists()


def test_a_busy_server_is_asked_five_times_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever retries: the client library, or this project around it, must not multiply the other's attempts."""
    monkeypatch.setattr(dicomweb, "WAIT", tenacity.wait_none())
    failures = [503] * 20
    with broken("http://127.0.0.1:9", failures) as address, pytest.raises(FuselipError) as caught:
        dicomweb.fetch_studies(f"{address}/dicom-web", tmp_path / "studies")
    assert str(caught.value) == f"the DICOMweb server at {address}/dicom-web answers 503; try again later"
    assert len(failures) == 20 - 5
    failures = [401] * 20
    with broken("http://127.0.0.1:9", failures) as address, pytest.raises(FuselipError, match="answers 401; check"):
        dicomweb.fetch_studies(f"{address}/dicom-web", tmp_path / "studies")
    assert len(failures) == 20 - 1, "a refusal is final"
