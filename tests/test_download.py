"""Downloads over real HTTP from a server that answers, and misbehaves, as the Hub and Zenodo do."""

from __future__ import annotations

import csv
import email.utils
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, SIGNATURE, FakeHub, Fault

from fuselip_core.data.download import download as download_module
from fuselip_core.data.download.download import DownloadSettings, download
from fuselip_core.data.download.hosts import folder_name_of, origins
from fuselip_core.data.download.manifest import read_manifest
from fuselip_core.data.download.partial_file import partial_path
from fuselip_core.data.download.retries import DownloadError
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.errors import sentence_of

ROCO = "eltorio/ROCOv2-radiology"


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


SHARD = noise(300_000)
FILES: dict[str, bytes | Path] = {
    ".gitattributes": b"*.parquet filter=lfs",
    "README.md": "licence: cc-by-nc-4.0, für Köpfe".encode(),
    "data/test-00000-of-00001.parquet": noise(70_001, 1),
    "data/train-00000-of-00001.parquet": SHARD,
    "data/validation-00000-of-00001.parquet": noise(5, 2),
}
LARGE = {path for path in FILES if path.endswith(".parquet")}
TRAIN = "data/train-00000-of-00001.parquet"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "ZENODO_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    fake = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("ZENODO_ENDPOINT", fake.url)
    with fake.running():
        yield fake


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data"


def quick(**changes: Any) -> DownloadSettings:
    return DownloadSettings(**{"backoff_seconds": 0.01, "timeout_seconds": 20.0, **changes})


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same(folder: Path, files: dict[str, bytes | Path]) -> bool:
    return all((folder / path).read_bytes() == content for path, content in files.items())


# ---- the Hub -----------------------------------------------------------------------------------------------------


def test_the_fake_answers_as_the_real_client_expects(hub: FakeHub, tmp_path: Path) -> None:
    """Guards the other tests: huggingface_hub itself downloads the same data set from the same server."""
    from huggingface_hub import snapshot_download

    hub.add_repo(ROCO, FILES, LARGE)
    folder = snapshot_download(
        ROCO, repo_type="dataset", local_dir=tmp_path / "theirs", endpoint=hub.url, token=False, max_workers=1
    )
    assert same(Path(folder), FILES)


def test_rocov2_comes_whole_from_the_hub(hub: FakeHub, target: Path) -> None:
    hub.add_repo(ROCO, FILES, LARGE)
    manifest = download("rocov2", target, quick())
    wanted = {path: content for path, content in FILES.items() if path != ".gitattributes"}
    assert same(target, wanted) and names(target) == {*wanted, "download.json"}
    assert manifest == read_manifest(target)
    assert (manifest.source, manifest.revision, manifest.licence) == (f"hub:{ROCO}", COMMIT, "cc-by-nc-4.0")
    assert manifest.page == f"{hub.url}/datasets/{ROCO}"
    assert {file.path: file.sha256 for file in manifest.files} == {
        path: hashlib.sha256(content).hexdigest() for path, content in wanted.items()
    }
    assert manifest.size == sum(map(len, wanted.values()))
    # Every byte belongs to the commit that was listed, though another may be pushed meanwhile.
    assert all(f"/resolve/{COMMIT}/" in seen.path for seen in hub.requests_for("/resolve/"))


def test_equal_downloads_have_equal_manifests(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_repo(ROCO, FILES, LARGE)
    for name in ("a", "b"):
        download("rocov2", tmp_path / name, quick())
    assert (tmp_path / "a" / "download.json").read_bytes() == (tmp_path / "b" / "download.json").read_bytes()


def test_a_complete_folder_is_verified_without_asking_anyone(hub: FakeHub, target: Path) -> None:
    hub.add_repo(ROCO, FILES, LARGE)
    first = download("rocov2", target, quick())
    hub.seen.clear()
    assert download("rocov2", target, quick()) == first
    assert download("rocov2", target, quick(verify="full")) == first
    assert hub.seen == []
    # A file that is gone or changed is the only one fetched again.
    (target / TRAIN).write_bytes(SHARD[::-1])
    (target / "README.md").unlink()
    assert download("rocov2", target, quick(verify="full")) == first
    assert same(target, {TRAIN: SHARD}) and len(hub.requests_for("/resolve/")) == 2


def test_other_files_are_another_request(hub: FakeHub, target: Path) -> None:
    hub.add_repo(ROCO, FILES, LARGE)
    download("rocov2", target, quick(include=("README.md",)))
    manifest = download(f"hub:{ROCO}", target, quick(exclude=("data/train*", ".git*")))
    assert {file.path for file in manifest.files} == set(FILES) - {TRAIN, ".gitattributes"}
    with pytest.raises(DownloadError, match=r"has 5 files, but none that matches \*\.csv"):
        download("rocov2", target, quick(include=("*.csv",)))


def test_refresh_asks_again_and_fetches_only_what_is_new(hub: FakeHub, target: Path) -> None:
    hub.add_repo(ROCO, FILES, LARGE)
    download("rocov2", target, quick())
    hub.add_repo(ROCO, {**FILES, "README.md": b"a new text"}, LARGE)
    hub.seen.clear()
    download("rocov2", target, quick(refresh=True))
    assert (target / "README.md").read_bytes() == b"a new text"
    assert [seen.path.rsplit("/", 1)[1] for seen in hub.requests_for("/resolve/")] == ["README.md"]


def test_a_token_goes_to_the_hub_and_nowhere_else(
    hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.add_repo(ROCO, FILES, LARGE, gated=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.fail("/store/", Fault(status=503), Fault(cut_after=10))
    download("rocov2", target, quick())
    assert same(target, {TRAIN: SHARD})
    assert all("Authorization" in seen.headers for seen in hub.requests_for("/datasets/"))
    assert hub.requests_for("/store/") and not any("Authorization" in s.headers for s in hub.requests_for("/store/"))
    written = caplog.text + (target / "download.json").read_text(encoding="utf-8")
    assert hub.token not in written and SIGNATURE not in written


def test_a_gated_data_set_says_which_page_and_which_variable(hub: FakeHub, target: Path) -> None:
    hub.add_repo(ROCO, FILES, LARGE, gated=True)
    with pytest.raises(DownloadError) as caught:
        download("rocov2", target, quick())
    assert f"accept its terms on {hub.url}/datasets/{ROCO}" in str(caught.value)
    assert "HF_TOKEN" in str(caught.value)
    assert names(target) == set()


def test_missing_and_private_data_sets_say_so(hub: FakeHub, target: Path) -> None:
    hub.add_repo("some/private", FILES, LARGE, private=True)
    for name in ("some/private", "some/nothing"):
        with pytest.raises(DownloadError, match=f"data set {name} does not exist at .*, or is private.*HF_TOKEN"):
            download(f"hub:{name}", target, quick())
        assert not target.exists()
    target.mkdir()  # of the user's own, hence left alone
    hub.add_repo(ROCO, FILES, LARGE)
    with pytest.raises(DownloadError, match="has no revision 'v9'"):
        download(f"hub:{ROCO}@v9", target, quick())
    assert target.is_dir()


def test_listing_survives_a_busy_hub(hub: FakeHub, target: Path) -> None:
    hub.add_repo(ROCO, FILES, LARGE)
    hub.fail(f"/api/datasets/{ROCO}", Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}))
    download("rocov2", target, quick())
    assert same(target, {TRAIN: SHARD})


def test_a_hub_that_is_not_there(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for source, variable in (("rocov2", "HF_ENDPOINT"), ("rocov2-zenodo", "ZENODO_ENDPOINT")):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
        with pytest.raises(DownloadError, match=r"connection to .*127\.0\.0\.1.* failed .*, 2 times in a row"):
            download(source, target, quick(attempts=2))


# ---- Zenodo ------------------------------------------------------------------------------------------------------


def test_medpix_in_zenodos_layout_comes_whole(hub: FakeHub, target: Path, shared: Path) -> None:
    folder = shared / "data" / "medpix-rocov2"
    files: dict[str, bytes | Path] = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    hub.add_record("10821435", files)
    hub.fail("train_images.zip", Fault(cut_after=3_000_001), Fault(status=429, headers={"Retry-After": "0"}))
    manifest = download("rocov2-zenodo", target, quick())
    assert (manifest.source, manifest.revision, manifest.licence) == ("zenodo:10821435", "10821435", "cc-by-nc-4.0")
    assert {file.path for file in manifest.files} == set(files)
    for file in manifest.files:
        content = Path(files[file.path]).read_bytes()
        assert file.sha256 == hashlib.sha256(content).hexdigest()
        assert file.checksum == f"md5:{hashlib.md5(content).hexdigest()}"
        assert (target / file.path).read_bytes() == content


def test_both_hosts_of_rocov2_end_in_one_schema(hub: FakeHub, tmp_path: Path, shared: Path) -> None:
    """The validation split of real data, from Zenodo's layout and from the Hub's: the same images and texts."""
    from typer.testing import CliRunner

    from fuselip_core.cli.main import app

    folder = shared / "data" / "medpix-rocov2"
    names = ("valid_images.zip", "valid_captions.csv", "valid_concepts.csv", "license_information.csv")
    hub.add_record("10821435", {name: folder / name for name in names})
    with zipfile.ZipFile(folder / "valid_images.zip") as archive:
        bytes_of = {Path(name).stem: archive.read(name) for name in archive.namelist()}
    with (folder / "valid_captions.csv").open(encoding="utf-8", newline="") as stream:
        captions = list(csv.DictReader(stream))
    rows = [
        {"image": {"bytes": bytes_of[row["ID"]], "path": None}, "image_id": row["ID"], "caption": row["Caption"]}
        for row in captions
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub.parquet")
    hub.add_repo(ROCO, {"data/validation-00000-of-00001.parquet": tmp_path / "hub.parquet"}, set())
    run, found = CliRunner().invoke, {}
    for source in ("rocov2-zenodo", "rocov2"):
        raw, out = tmp_path / source, tmp_path / f"{source}-prepared"
        assert run(app, ["data", "download", source, "--out", str(raw)]).exit_code == 0
        assert run(app, ["data", "prepare", "--source", "rocov2", "--root", str(raw), "--out", str(out)]).exit_code == 0
        assert run(app, ["data", "inspect", str(out), "--samples", "2"]).exit_code == 0
        prepared = PreparedData(out)
        images = {row["image_id"]: row for batch in prepared.iter_images("valid") for row in batch.to_pylist()}
        schema = next(prepared.iter_images("valid")).schema
        found[source] = schema, {name: row["sha256"] for name, row in images.items()}, prepared.pairs("valid")
        assert prepared.manifest["origin"]["licence"] == "cc-by-nc-4.0"
        assert all(row["licence"] for row in images.values())
    (schema, hashes, pairs), (other_schema, other_hashes, other_pairs) = found.values()
    assert schema == other_schema and pairs.schema == other_pairs.schema
    assert len(hashes) == 197 and hashes == other_hashes
    texts = [
        dict(zip(table["pair_id"].to_pylist(), table["target_text"].to_pylist(), strict=True))
        for table in (pairs, other_pairs)
    ]
    assert len(texts[0]) == 191 and texts[0] == texts[1]


def test_a_restricted_record_asks_for_access_and_token(
    hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_record("77", {"a.zip": noise(1000)}, access="restricted")
    with pytest.raises(DownloadError, match=rf"request access on {hub.url}/records/77 and set ZENODO_TOKEN"):
        download("zenodo:77", target, quick())
    monkeypatch.setenv("ZENODO_TOKEN", hub.token)
    assert download("zenodo:77", target, quick()).size == 1000


def test_a_missing_record_names_its_page(hub: FakeHub, target: Path) -> None:
    with pytest.raises(DownloadError, match=r"Zenodo record 5 is not at .*records/5"):
        download("zenodo:5", target, quick())


def test_a_name_that_leaves_the_folder_is_refused(hub: FakeHub, target: Path) -> None:
    for name in ("../evil.zip", "/etc/evil", "a/../../evil", "a\\..\\evil"):
        hub.add_record("6", {name: b"evil", "good.csv": b"good"})
        with pytest.raises(DownloadError, match="whose path leaves the target folder"):
            download("zenodo:6", target, quick())
    assert names(target.parent) == set()


# ---- interruptions -----------------------------------------------------------------------------------------------


def test_cuts_at_any_byte_are_gone_on_from(hub: FakeHub, target: Path) -> None:
    """Twelve cuts at random places, some reset and some in order: nothing is read twice and nothing is lost."""
    hub.add_record("1", {"images.zip": SHARD})
    rng = np.random.default_rng(11)
    cuts = [int(cut) for cut in rng.integers(1, 24_000, 12)]
    hub.fail("images.zip", *(Fault(cut_after=cut) for cut in cuts))
    download("zenodo:1", target, quick(attempts=3))
    assert same(target, {"images.zip": SHARD})
    asked = [seen.headers.get("Range") for seen in hub.requests_for("images.zip")]
    offsets = [int(span.removeprefix("bytes=").rstrip("-")) for span in asked[1:] if span]
    # Resetting a connection may lose bytes on the way, never more than were sent.
    assert len(asked) >= 13 and offsets == sorted(offsets)
    assert all(later - earlier <= cut for earlier, later, cut in zip([0, *offsets], offsets, cuts, strict=False))


@pytest.mark.parametrize("cut", [0, 1, 16383, 16384, 299_999])
def test_a_cut_through_the_redirect_of_the_hub(hub: FakeHub, target: Path, cut: int) -> None:
    hub.add_repo(ROCO, FILES, LARGE)
    hub.fail("/store/" + hashlib.sha256(SHARD).hexdigest(), Fault(cut_after=cut))
    download("rocov2", target, quick())
    assert same(target, {TRAIN: SHARD})


def test_a_server_without_ranges_starts_over(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"images.zip": SHARD})
    hub.fail("images.zip", Fault(cut_after=100_000), Fault(ignore_range=True))
    download("zenodo:1", target, quick())
    assert same(target, {"images.zip": SHARD})


def test_patience_ends_when_no_byte_comes(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"images.zip": SHARD})
    hub.fail("images.zip", *(Fault(cut_after=0) for _ in range(3)))
    with pytest.raises(
        DownloadError, match=r"images\.zip: .*broke after 0 bytes, 3 times in a row; run it again later"
    ):
        download("zenodo:1", target, quick(attempts=3))
    download("zenodo:1", target, quick(attempts=3))
    assert same(target, {"images.zip": SHARD})


def test_failures_of_one_file_stop_the_others_and_keep_their_bytes(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"a.csv": b"x" * 1000, "images.zip": SHARD})
    hub.fail("a.csv", Fault(status=404))
    hub.fail("images.zip", Fault(seconds_a_block=0.2))
    with pytest.raises(DownloadError, match=r"is not at 127\.0\.0\.1"):
        download("zenodo:1", target, quick())
    assert "images.zip" not in names(target) and "download.json" not in names(target)


def test_waits_as_long_as_the_server_asks(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"a.csv": b"abc", "b.csv": b"def"})
    moment = int(time.time()) + 3
    date = email.utils.formatdate(moment, usegmt=True)
    hub.fail("a.csv", Fault(status=429, headers={"Retry-After": "1"}))
    hub.fail("b.csv", Fault(status=503, headers={"Retry-After": date}))
    download("zenodo:1", target, quick())
    assert time.time() >= moment
    first, second = hub.requests_for("a.csv")
    assert second.moment - first.moment >= 0.95
    assert same(target, {"a.csv": b"abc", "b.csv": b"def"})


def test_the_hubs_own_way_to_ask_for_patience(hub: FakeHub, target: Path) -> None:
    """It limits by windows of five minutes, which no back-off outlasts, and sends no Retry-After."""
    hub.add_repo(ROCO, FILES, LARGE)
    policy = {"RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    hub.fail(f"/api/datasets/{ROCO}", Fault(status=429, headers={"RateLimit": '"api";r=0;t=1', **policy}))
    hub.fail("README.md", Fault(status=429, headers={"RateLimit": '"resolvers";r=0;t=9000', **policy}))
    with pytest.raises(DownloadError, match=r"README\.md: .* asks to wait 9000 s"):
        download("rocov2", target, quick())
    first, second = hub.requests_for(f"/api/datasets/{ROCO}")[:2]
    assert second.moment - first.moment >= 0.95


def test_a_server_that_asks_for_an_hour_is_not_waited_for(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"a.csv": b"abc"})
    hub.fail("a.csv", Fault(status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(DownloadError, match="asks to wait 3600 s"):
        download("zenodo:1", target, quick())


def test_waits_grow_between_failures(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"a.csv": b"abc"})
    hub.fail("a.csv", *(Fault(status=status) for status in (500, 502, 503, 504)))
    download("zenodo:1", target, quick(backoff_seconds=0.05))
    moments = [seen.moment for seen in hub.requests_for("a.csv")]
    waits = np.diff(moments)
    assert len(waits) == 4 and (waits >= [0.05, 0.1, 0.2, 0.4]).all()


CHILD = """
import sys
from pathlib import Path
from fuselip_core.data.download.download import DownloadSettings, download
download("zenodo:1", Path(sys.argv[1]), DownloadSettings())
"""


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_a_killed_download_goes_on_where_it_stopped(hub: FakeHub, target: Path, repository: Path, share: float) -> None:
    hub.add_record("1", {"images.zip": SHARD, "small.csv": b"abc"})
    hub.fail("images.zip", Fault(seconds_a_block=0.03))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(target)], cwd=repository)
    partial = partial_path(target / "images.zip")
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > share * len(SHARD)):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert "images.zip" not in names(target) and "download.json" not in names(target)
    kept = partial.stat().st_size
    download("zenodo:1", target, quick())
    assert hub.requests_for("images.zip")[-1].headers["Range"] == f"bytes={kept}-"
    assert same(target, {"images.zip": SHARD, "small.csv": b"abc"})
    assert names(target) == {"images.zip", "small.csv", "download.json"}


def test_what_a_killed_process_was_writing_beside_is_swept_away(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"images.zip": SHARD, ".hidden.csv": b"abc"})
    hub.fail("images.zip", Fault(cut_after=100_000))
    with pytest.raises(DownloadError):
        download("zenodo:1", target, quick(attempts=1))
    for draft in ("..images.zip.partial.json.4711.partial", ".download.json.4712.partial"):
        (target / draft).write_text("half")
    download("zenodo:1", target, quick())
    assert same(target, {"images.zip": SHARD, ".hidden.csv": b"abc"})
    assert names(target) == {"images.zip", ".hidden.csv", "download.json"}
    assert "Range" in hub.requests_for("images.zip")[-1].headers


def test_only_one_process_downloads_into_a_folder(hub: FakeHub, target: Path, repository: Path) -> None:
    hub.add_record("1", {"images.zip": SHARD})
    hub.fail("images.zip", Fault(seconds_a_block=0.1))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(target)], cwd=repository)
    while not hub.requests_for("images.zip"):
        assert child.poll() is None
        time.sleep(0.01)
    with pytest.raises(DownloadError, match="another process is downloading into"):
        download("zenodo:1", target, quick())
    child.kill()
    child.wait()
    download("zenodo:1", target, quick())
    assert same(target, {"images.zip": SHARD})


def test_a_file_that_changed_while_away_is_read_from_the_start(hub: FakeHub, target: Path) -> None:
    hub.plain["a.bin"] = SHARD
    hub.fail("a.bin", Fault(cut_after=100_000))
    with pytest.raises(DownloadError):
        download(f"{hub.url}/plain/a.bin", target, quick(attempts=1))
    changed = SHARD[::-1]
    hub.plain["a.bin"] = changed
    download(f"{hub.url}/plain/a.bin", target, quick())
    last = hub.requests_for("a.bin")[-1]
    assert "Range" in last.headers and "If-Range" in last.headers
    assert same(target, {"a.bin": changed})


def test_without_tag_and_checksum_nothing_is_pieced_together(hub: FakeHub, target: Path) -> None:
    hub.plain["a.bin"] = SHARD
    hub.fail("a.bin", Fault(cut_after=100_000, etag='W/"weak"'))
    with pytest.raises(DownloadError):
        download(f"{hub.url}/plain/a.bin", target, quick(attempts=1))
    hub.fail("a.bin", Fault(etag='W/"weak"'))
    download(f"{hub.url}/plain/a.bin", target, quick())
    assert "Range" not in hub.requests_for("a.bin")[-1].headers
    assert same(target, {"a.bin": SHARD})


# ---- verification ------------------------------------------------------------------------------------------------


def test_a_damaged_transfer_is_fetched_once_more(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"images.zip": SHARD})
    hub.fail("images.zip", Fault(damage=True))
    download("zenodo:1", target, quick())
    assert same(target, {"images.zip": SHARD}) and len(hub.requests_for("images.zip")) == 2


@pytest.mark.parametrize("source", ["zenodo:1", f"hub:{ROCO}"])
def test_a_wrong_checksum_never_gets_the_final_name(hub: FakeHub, target: Path, source: str) -> None:
    path = "images.zip" if source == "zenodo:1" else TRAIN
    hub.wrong_checksums = {path}
    hub.add_record("1", {path: SHARD})
    hub.add_repo(ROCO, FILES, LARGE)
    with pytest.raises(DownloadError, match=r"came with checksum .* instead of .*0000, 2 times; it may be damaged"):
        download(source, target, quick())
    assert path not in names(target) and "download.json" not in names(target)


def test_small_files_of_the_hub_are_verified_by_their_git_name(hub: FakeHub, target: Path) -> None:
    hub.add_repo(ROCO, FILES, LARGE)
    hub.fail("README.md", Fault(damage=True), Fault(damage=True))
    with pytest.raises(DownloadError, match=r"README\.md came with checksum gitsha1:"):
        download("rocov2", target, quick())


def test_another_size_than_listed_is_refused(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"images.zip": SHARD})
    hub.fail("images.zip", *(Fault(content=b"<html>log in first</html>") for _ in range(2)))
    with pytest.raises(DownloadError, match="is offered with 25 bytes instead of 300,000, 2 times"):
        download("zenodo:1", target, quick())
    assert "images.zip" not in names(target)


def test_files_put_there_by_hand_are_taken_if_they_are_right(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"a.zip": SHARD, "b.zip": SHARD[:1000], "c.zip": SHARD[:2000]})
    target.mkdir()
    (target / "a.zip").write_bytes(SHARD)
    (target / "b.zip").write_bytes(SHARD[1000:2000])
    (target / "c.zip").write_bytes(SHARD[:1500])
    download("zenodo:1", target, quick())
    assert not hub.requests_for("a.zip") and hub.requests_for("b.zip") and hub.requests_for("c.zip")
    assert same(target, {"a.zip": SHARD, "b.zip": SHARD[:1000], "c.zip": SHARD[:2000]})


def test_a_stale_partial_of_another_version_is_not_used(hub: FakeHub, target: Path) -> None:
    target.mkdir()
    partial = partial_path(target / "images.zip")
    partial.write_bytes(b"rubbish" * 100)
    partial.with_name(partial.name + ".json").write_text('{"etag": "\\"old\\"", "size": 7, "checksum": "md5:00"}')
    hub.add_record("1", {"images.zip": SHARD})
    download("zenodo:1", target, quick())
    assert same(target, {"images.zip": SHARD}) and names(target) == {"images.zip", "download.json"}


def test_a_partial_with_wrong_bytes_is_found_out(hub: FakeHub, target: Path) -> None:
    """As after a power cut: the length is right, the bytes are not."""
    hub.add_record("1", {"images.zip": SHARD})
    hub.fail("images.zip", Fault(cut_after=200_000))
    with pytest.raises(DownloadError):
        download("zenodo:1", target, quick(attempts=1))
    partial = partial_path(target / "images.zip")
    partial.write_bytes(b"\0" * partial.stat().st_size)
    download("zenodo:1", target, quick())
    assert same(target, {"images.zip": SHARD})


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_an_address_with_its_checksum(hub: FakeHub, target: Path, kind: str) -> None:
    hub.plain["a.bin"] = SHARD
    digest = hashlib.new(kind, SHARD).hexdigest()
    hub.fail("a.bin", Fault(chunked=True, cut_after=20_000), Fault(chunked=True, ignore_range=True))
    manifest = download(f"{hub.url}/plain/a.bin?key=secret#{kind}={digest}", target, quick())
    assert same(target, {"a.bin": SHARD}) and manifest.files[0].checksum == f"{kind}:{digest}"
    assert "secret" not in (target / "download.json").read_text(encoding="utf-8")
    with pytest.raises(DownloadError, match=r"a\.bin came with checksum"):
        download(f"{hub.url}/plain/a.bin#{kind}={'0' * len(digest)}", target / "other", quick())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rocov3", "unknown data set 'rocov3'; name one of rocov2"),
        ("hub:rocov2", "is not the name of a data set on the Hub; write hub:OWNER/NAME"),
        ("zenodo:latest", "is not a Zenodo record; write zenodo:NUMBER"),
        ("https://127.0.0.1/", "names no file"),
        ("https://127.0.0.1/a#sha256=12", "is not a checksum"),
    ],
)
def test_wrong_sources_say_how_to_write_them(target: Path, source: str, message: str) -> None:
    with pytest.raises(DownloadError, match=message):
        download(source, target, quick())


def test_every_named_origin_can_be_listed(hub: FakeHub, tmp_path: Path) -> None:
    for name, origin in origins().items():
        kind, _, rest = origin.source.partition(":")
        files: dict[str, bytes | Path] = {"README.md": b"x", "images.zip": b"y", "a-0000.tar": b"z", "b.parquet": b"p"}
        files["train.json"] = b"[]"
        hub.add_record(rest, files) if kind == "zenodo" else hub.add_repo(rest, files, {"a-0000.tar"})
        assert len(download(name, tmp_path / name, quick()).files) >= 2, name


# ---- the disk ----------------------------------------------------------------------------------------------------


def test_too_little_room_is_seen_before_anything_is_fetched(
    hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    hub.add_record("1", {"images.zip": SHARD})
    real = shutil.disk_usage(target.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=250_000))
    with pytest.raises(DownloadError, match=r"needs 300\.0 kB more in .*, where 250\.0 kB are free; free some space"):
        download("zenodo:1", target, quick())
    assert hub.requests_for("images.zip") == []
    # What an earlier run left counts.
    hub.fail("images.zip", Fault(cut_after=100_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real)
    with pytest.raises(DownloadError):
        download("zenodo:1", target, quick(attempts=1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=250_000))
    download("zenodo:1", target, quick())
    assert same(target, {"images.zip": SHARD})


def test_a_disk_that_fills_up_meanwhile_is_one_sentence(hub: FakeHub, target: Path) -> None:
    """/dev/full answers every write as a full disk does; its size of zero passes the check before."""
    hub.add_record("1", {"images.zip": SHARD})
    target.mkdir()
    partial_path(target / "images.zip").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        download("zenodo:1", target, quick())
    wanted = f"no space is left on the disk at {target / 'images.zip'}; free some and run the same command again"
    assert sentence_of(caught.value) == wanted
    assert not (target / "images.zip").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_really_full_disk_keeps_what_came_and_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a file system here")
    try:
        hub.plain["a.bin"] = SHARD
        hub.fail("a.bin", Fault(chunked=True))  # no size is stated, so the room cannot be checked before
        with pytest.raises(OSError) as caught:
            download(f"{hub.url}/plain/a.bin", disk, quick())
        assert sentence_of(caught.value).startswith(f"no space is left on the disk at {disk / 'a.bin'}; ")
        assert not (disk / "a.bin").exists() and partial_path(disk / "a.bin").stat().st_size >= 100_000
        with pytest.raises(DownloadError, match=r"needs .* more in .*disk"):
            download(f"{hub.url}/plain/a.bin", disk, quick())
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        download(f"{hub.url}/plain/a.bin", disk, quick())
        assert same(disk, {"a.bin": SHARD})
        assert "Range" in hub.requests_for("a.bin")[-1].headers
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="cannot be created"):
        download("rocov2", tmp_path / "file" / "data", quick())


# ---- progress ----------------------------------------------------------------------------------------------------


def test_progress_is_logged_and_ends_at_the_whole(
    hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fuselip_core import progress

    meters: list[progress.ByteMeter] = []

    class Kept(progress.ByteMeter):
        def __init__(self, description: str, total: int | None) -> None:
            super().__init__(description, total)
            meters.append(self)

    monkeypatch.setattr(download_module, "ByteMeter", Kept)
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="fuselip")
    hub.add_record("1", {"images.zip": SHARD})
    hub.fail("images.zip", Fault(cut_after=50_000), Fault(damage=True, ignore_range=True))
    download("zenodo:1", target, quick())
    assert meters[0].done == meters[0].total == len(SHARD)
    assert "download Zenodo record 1: 0 of 0 MB" in caplog.text


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fuselip_core.progress import ByteMeter

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ByteMeter("download a", 1000) as meter:
        threads = [threading.Thread(target=lambda: [meter.advance(1) for _ in range(100)]) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert meter.done == 1000
    assert "download a" in capsys.readouterr().err


def test_manifest_is_plain_json(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"a.csv": b"abc"})
    download("zenodo:1", target, quick())
    content = json.loads((target / "download.json").read_text(encoding="utf-8"))
    assert content["files"] == [
        {
            "path": "a.csv",
            "size": 3,
            "sha256": hashlib.sha256(b"abc").hexdigest(),
            "checksum": f"md5:{hashlib.md5(b'abc').hexdigest()}",
        }
    ]
    (target / "download.json").write_text("{broken", encoding="utf-8")
    assert read_manifest(target) is None
    download("zenodo:1", target, quick())
    assert read_manifest(target) is not None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("rocov2", "rocov2"),
        ("hub:eltorio/ROCOv2-radiology@main", "ROCOv2-radiology"),
        ("zenodo:10821435", "10821435"),
        ("https://user:password@host.example/a/images.zip?key=secret#sha256=ab", "images"),
        ("https://host.example/", "download"),
        ("https://host.example/a/..", "download"),
    ],
)
def test_the_folder_of_a_source_hides_what_is_secret(source: str, name: str) -> None:
    assert folder_name_of(source) == name


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "ZENODO_ENDPOINT"])
@pytest.mark.parametrize("address", ["nonsense", "http://", "ftp://mirror.example", "https:mirror.example"])
def test_an_endpoint_that_is_no_address_is_refused_at_once(
    target: Path, monkeypatch: pytest.MonkeyPatch, variable: str, address: str
) -> None:
    monkeypatch.setenv(variable, address)
    with pytest.raises(DownloadError, match=f"{variable} is '{address}', which is not a URL"):
        download("rocov2", target, DownloadSettings())
    assert not target.exists()


@pytest.mark.parametrize("name", ["a--b/c", "a/..", "a/b.git", "-a/b", "a/b.", "a/" + "x" * 100])
def test_a_name_that_the_hub_does_not_allow_is_one_sentence(hub: FakeHub, target: Path, name: str) -> None:
    with pytest.raises(DownloadError, match=r"write hub:OWNER/NAME|does not exist"):
        download(f"hub:{name}", target, quick(attempts=1))


def test_the_lock_is_no_file_of_the_data_set(hub: FakeHub, target: Path) -> None:
    hub.add_record("1", {"a.csv": b"abc"})
    download("zenodo:1", target, quick())
    assert names(target) == {"a.csv", "download.json"}


def test_a_quick_look_at_present_files_says_that_sizes_are_checked(
    hub: FakeHub, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_record("1", {"a.csv": b"abc"})
    download("zenodo:1", target, quick())
    for verify, said in (("quick", "their sizes checked"), ("full", "their checksums checked")):
        caplog.clear()
        with caplog.at_level("INFO", "fuselip"):
            download("zenodo:1", target, quick(verify=verify))
        assert said in caplog.text and "verified" not in caplog.text
