"""A local server that answers as the Hugging Face Hub and the Zenodo API do, and that can be told to misbehave.

Two addresses are served: `url` plays the Hub and Zenodo, `store_url` (another port, hence another origin) plays the
object store that the Hub redirects large files to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "X-Amz-Signature=secret-of-the-store"
TREE_PAGE = 2  # entries a page: small, so that listings come in several


@dataclass
class Fault:
    """What happens to one request instead of, or during, its answer."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection is reset
    damage: bool = False  # one byte of the body is wrong
    seconds_a_block: float = 0.0  # blocks of 16 kB come this slowly
    ignore_range: bool = False  # the whole file, though a part was asked for
    chunked: bool = False  # no Content-Length
    content: bytes | None = None  # another body, with status 200
    etag: str | None = None


@dataclass(frozen=True)
class Seen:
    """A request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    moment: float


@dataclass
class _Repo:
    files: dict[str, bytes | Path]
    large: frozenset[str]
    gated: bool
    private: bool


class FakeHub:
    """State of the server: what it holds, what it was asked, and which faults are still to come."""

    def __init__(self) -> None:
        self.repos: dict[str, _Repo] = {}
        self.records: dict[str, tuple[dict[str, bytes | Path], str]] = {}
        self.plain: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.lock = threading.Lock()
        self.token = "hf_secret_token_of_the_user"
        self.wrong_checksums: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.commits = 0
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self)) for _ in range(2)]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def add_repo(
        self, name: str, files: dict[str, bytes | Path], large: set[str], *, gated: bool = False, private: bool = False
    ) -> None:
        self.repos[name] = _Repo(files, frozenset(large), gated, private)

    def add_record(self, number: str, files: dict[str, bytes | Path], access: str = "open") -> None:
        self.records[number] = (files, access)

    def fail(self, path_part: str, *faults: Fault) -> None:
        """The next requests whose path contains `path_part` meet `faults`, one each."""
        self.faults[path_part] += faults

    def requests_for(self, path_part: str) -> list[Seen]:
        with self.lock:
            return [seen for seen in self.seen if path_part in seen.path]

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        threads = [threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True) for s in self._servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server in self._servers:
                server.shutdown()
                server.server_close()

    def next_fault(self, path: str) -> Fault | None:
        with self.lock:
            for part, faults in self.faults.items():
                if part in path and faults:
                    return faults.pop(0)
        return None


def read(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer()

        do_PUT = do_POST

        def answer(self) -> None:
            with hub.lock:
                headers = {name.title(): value for name, value in self.headers.items()}
                hub.seen.append(Seen(self.command, self.path, headers, time.monotonic()))
            self.fault = hub.next_fault(self.path) or Fault()
            if self.fault.status is not None:
                self.reply(self.fault.status, self.fault.content or b"busy", self.fault.headers)
                return
            parts = urlsplit(self.path)
            self.query = parse_qs(parts.query)
            route = unquote(parts.path).strip("/").split("/")
            try:
                self.route(route)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def route(self, route: list[str]) -> None:
            if self.command in ("POST", "PUT"):
                self.take(route)
            elif route[:2] in (["api", "datasets"], ["api", "models"]):
                self.hub_api("/".join(route[2:4]), route[4:])
            elif len(route) > 3 and route[2] == "resolve":
                self.resolve("/".join(route[:2]), route[3], "/".join(route[4:]))
            elif route[0] == "datasets" and route[3] == "resolve":
                self.resolve("/".join(route[1:3]), route[4], "/".join(route[5:]))
            elif route[0] == "store":
                self.store(route[1])
            elif route[:2] == ["api", "records"]:
                self.zenodo(route[2], route[3:])
            elif route[0] == "plain" and route[1] in hub.plain:
                self.file(hub.plain[route[1]], f'"{hashlib.sha256(hub.plain[route[1]]).hexdigest()}"')
            else:
                self.reply(404, b"nothing here")

        # -- Hugging Face ---------------------------------------------------------------------------------------------

        def allowed(self, name: str) -> bool:
            repo = hub.repos.get(name)
            known = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if repo is None or (repo.private and not known):
                headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                self.reply(404 if known else 401, b'{"error": "Repository not found"}', headers)
                return False
            if repo.gated and not known:
                message = f"Access to dataset {name} is restricted. You must have access to it and be authenticated."
                self.reply(401, message.encode(), {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
                return False
            return True

        def hub_api(self, name: str, rest: list[str]) -> None:
            repo = hub.repos.get(name)
            if repo is None or repo.private:
                if not self.allowed(name):
                    return
                assert repo is not None
            if rest and rest[1] not in ("main", COMMIT):
                self.reply(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            elif rest[:1] == ["tree"]:
                if self.allowed(name):
                    self.tree(name, repo)
            else:
                self.json(
                    {
                        "_id": "65f1",
                        "id": name,
                        "author": name.split("/")[0],
                        "sha": COMMIT,
                        "lastModified": "2024-11-13T10:02:07.000Z",
                        "private": repo.private,
                        "gated": "auto" if repo.gated else False,
                        "disabled": False,
                        "tags": [],
                        "downloads": 5,
                        "likes": 1,
                        "cardData": {"license": "cc-by-nc-4.0"},
                        "siblings": [{"rfilename": path} for path in repo.files],
                        "createdAt": "2024-11-01T10:02:07.000Z",
                    }
                )

        def tree(self, name: str, repo: _Repo) -> None:
            folders = sorted({path.rsplit("/", 1)[0] for path in repo.files if "/" in path})
            entries = [{"type": "directory", "oid": "f" * 40, "size": 0, "path": folder} for folder in folders]
            for path, content in repo.files.items():
                entries.append(self.tree_entry(path, read(content), path in repo.large))
            start = int(self.query.get("cursor", ["0"])[0])
            headers = {}
            if start + TREE_PAGE < len(entries):
                path = urlsplit(self.path).path
                follow = f"{hub.url}{path}?recursive=true&expand=false&limit={TREE_PAGE}&cursor={start + TREE_PAGE}"
                headers["Link"] = f'<{follow}>; rel="next"'
            self.json(entries[start : start + TREE_PAGE], headers)

        def tree_entry(self, path: str, content: bytes, large: bool) -> dict[str, object]:
            sha256 = hashlib.sha256(content).hexdigest()
            if not large:
                return {"type": "file", "oid": git_name(content), "size": len(content), "path": path}
            if path in hub.wrong_checksums:
                sha256 = "0" * 64
            return {
                "type": "file",
                "oid": git_name(sha256.encode()),
                "size": len(content),
                "path": path,
                "lfs": {"oid": sha256, "size": len(content), "pointerSize": 134},
            }

        def resolve(self, name: str, revision: str, path: str) -> None:
            if not self.allowed(name):
                return
            repo = hub.repos[name]
            if revision not in ("main", COMMIT) or path not in repo.files:
                self.reply(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
                return
            content = read(repo.files[path])
            headers = {"X-Repo-Commit": COMMIT}
            if path not in repo.large:
                self.file(content, f'"{git_name(content)}"', headers)
                return
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{sha256}"',
                "Location": f"{hub.store_url}/store/{sha256}?{SIGNATURE}&name={quote(path)}",
                "Accept-Ranges": "bytes",
            }
            self.reply(302, b"Found. Redirecting to the store", headers)

        def store(self, sha256: str) -> None:
            if SIGNATURE not in self.path:
                self.reply(403, b"<Error><Code>AccessDenied</Code></Error>")
                return
            for repo in hub.repos.values():
                for path in repo.large:
                    content = read(repo.files[path])
                    if hashlib.sha256(content).hexdigest() == sha256:
                        # Large stores give an ETag of their own, not the one that the Hub links.
                        self.file(content, f'"{hashlib.md5(content).hexdigest()}-1"')
                        return
            self.reply(404, b"no such key")

        # -- uploads --------------------------------------------------------------------------------------------------

        def take(self, route: list[str]) -> None:
            if self.headers.get("Authorization") != f"Bearer {hub.token}" and route[0] != "uploads":
                self.reply(401, b'{"error": "Invalid credentials"}')
            elif route[0] == "uploads":
                hub.uploads[route[1]] = self.sent
                self.reply(200, b"")
            elif route == ["api", "validate-yaml"]:
                self.json({"errors": [], "warnings": []})
            elif route == ["api", "repos", "create"]:
                asked = json.loads(self.sent)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in hub.repos:
                    self.reply(409, b'{"error": "You already created this model repo"}')
                    return
                hub.add_repo(name, {}, set(), private=bool(asked.get("private")))
                self.json({"url": f"{hub.url}/{name}", "name": name, "id": "65f2"})
            elif route[-2:] == ["objects", "batch"]:
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.store_url}/uploads/{each['oid']}"}}}
                    for each in json.loads(self.sent)["objects"]
                ]
                self.json({"transfer": "basic", "objects": objects})
            elif route[4] == "preupload":
                modes = [
                    {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                    for each in json.loads(self.sent)["files"]
                ]
                self.json({"files": [{**each, "shouldIgnore": False} for each in modes]})
            else:
                self.commit("/".join(route[2:4]))

        def commit(self, name: str) -> None:
            repo, large = hub.repos[name], set(hub.repos[name].large)
            for line in map(json.loads, self.sent.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo.files[value["path"]] = hub.uploads[value["oid"]]
                    large.add(value["path"])
            repo.large = frozenset(large)
            hub.commits += 1
            self.json({"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{name}/commit/{COMMIT}"})

        # -- Zenodo ---------------------------------------------------------------------------------------------------

        def zenodo(self, number: str, rest: list[str]) -> None:
            if number not in hub.records:
                message = {"status": 404, "message": "The persistent identifier does not exist."}
                self.reply(404, json.dumps(message).encode())
                return
            files, access = hub.records[number]
            known = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if rest and not (access == "open" or known):
                self.reply(403, b'{"status": 403, "message": "Permission denied."}')
            elif rest:
                content = read(files["/".join(rest[1:-1])])
                self.file(content, f'"md5:{hashlib.md5(content).hexdigest()}"')
            else:
                self.json(self.record(number, files if access == "open" or known else {}, access))

        def record(self, number: str, files: dict[str, bytes | Path], access: str) -> dict[str, object]:
            listed = []
            for key, content in files.items():
                data = read(content)
                digest = "0" * 32 if key in hub.wrong_checksums else hashlib.md5(data).hexdigest()
                listed.append(
                    {
                        "id": "f3b2c0de-0000-4000-8000-000000000000",
                        "key": key,
                        "size": len(data),
                        "checksum": f"md5:{digest}",
                        "links": {"self": f"{hub.url}/api/records/{number}/files/{quote(key)}/content"},
                    }
                )
            return {
                "created": "2024-03-15T10:00:00.000000+00:00",
                "id": int(number),
                "conceptrecid": "8333644",
                "doi": f"10.5281/zenodo.{number}",
                "revision": 4,
                "title": "ROCOv2",
                "metadata": {"title": "ROCOv2", "access_right": access, "license": {"id": "cc-by-nc-4.0"}},
                "files": listed,
                "links": {"self": f"{hub.url}/api/records/{number}", "self_html": f"{hub.url}/records/{number}"},
                "state": "done",
                "submitted": True,
            }

        # -- HTTP -----------------------------------------------------------------------------------------------------

        def file(self, content: bytes, etag: str, headers: dict[str, str] | None = None) -> None:
            """The file, or the part of it that Range and If-Range ask for (RFC 9110, sections 13 and 14)."""
            fault = self.fault
            if fault.content is not None:
                content = fault.content
            etag = fault.etag or etag
            headers = {"ETag": etag, "Accept-Ranges": "bytes", **(headers or {})}
            span = self.headers.get("Range")
            if self.headers.get("If-Range", etag) != etag or fault.ignore_range:
                span = None
            start, status = 0, 200
            if span:
                start = int(span.removeprefix("bytes=").partition("-")[0])
                if start >= len(content):
                    self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                    return
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                status = 206
            if fault.damage:
                middle = (start + len(content)) // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            self.body(status, content[start:], headers)

        def body(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            fault = self.fault
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header(*(("Transfer-Encoding", "chunked") if fault.chunked else ("Content-Length", len(content))))
            self.end_headers()
            if self.command == "HEAD":
                return
            end = len(content) if fault.cut_after is None else fault.cut_after
            for place in range(0, end, 16384):
                block = content[place : min(place + 16384, end)]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if fault.chunked else block)
                time.sleep(fault.seconds_a_block)
            if fault.chunked and fault.cut_after is None:
                self.wfile.write(b"0\r\n\r\n")
            if fault.cut_after is not None:
                self.cut()

        def cut(self) -> None:
            """Half of the cuts end the connection in order, half reset it; clients see different errors."""
            self.wfile.flush()
            self.close_connection = True
            if self.fault.cut_after is not None and self.fault.cut_after % 2:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def json(self, content: object, headers: dict[str, str] | None = None) -> None:
            self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

        def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler
