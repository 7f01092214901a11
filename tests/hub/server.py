"""A small server of the Hub's protocol, for tests: repositories with branches and commits, large
files on a host of their own, tokens; and what a server may do that means no good.

    GET       /api/models/OWNER/NAME[/revision/REVISION]       the commit and its files
    GET       /api/models/OWNER/NAME/tree/REVISION             the files
    HEAD GET  /OWNER/NAME/resolve/REVISION/FILE                a file, or where it lies
    POST      /api/repos/create
    POST      /api/models/OWNER/NAME/branch/BRANCH
    POST      /api/validate-yaml
    POST      /api/models/OWNER/NAME/preupload/REVISION        which files are large
    POST      /OWNER/NAME.git/info/lfs/objects/batch           where large ones go
    PUT       /large/SHA256                                    there
    POST      /api/models/OWNER/NAME/commit/REVISION
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png", ".bin", ".msgpack", ".pt", ".pkl", ".ckpt")
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by name, and which of them branches are at."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main") -> str:
        """A new commit that holds these files."""
        number = f"{len(self.commits)}:{sorted(files)}".encode()
        name = hashlib.sha1(number).hexdigest()
        self.commits[name], self.branches[branch] = dict(files), name
        return name


@dataclass
class Lie:
    """What the server tells or sends of a file in place of the truth."""

    size: int | None = None  # that it tells
    checksum: str | None = None  # that it tells
    body: bytes | None = None  # that it sends
    length: bool = True  # whether it says how long the body is
    cut: int | None = None  # bytes after which the connection ends
    redirect: str | None = None  # address that it sends readers to


@dataclass
class Request:
    method: str
    path: str
    token: str | None
    query: dict[str, list[str]]


class Hub:
    """The state of the server; `with Hub() as hub` starts it on a port of this machine."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_owner": True, "hf_reader": False}  # whether it may write
        self.large: Files = {}
        self.requests: list[Request] = []
        self.elsewhere: list[Request] = []  # what came to the host of large files
        self.lies: dict[str, Lie] = {}
        self.listed = True  # whether sizes and checksums stand in the list of files
        self.failing = 0  # the status of every answer, where it is not 0

    def __enter__(self) -> Hub:
        self.main = _start(_Handler, self)
        self.storage = _start(_StorageHandler, self)
        self.endpoint = f"http://127.0.0.1:{self.main.server_port}"
        self.storage_address = f"http://127.0.0.1:{self.storage.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.main, self.storage):
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Files, **settings: Any) -> str:
        """A repository with one commit, whose name is returned."""
        self.repositories[name] = Repository(**settings)
        return self.repositories[name].commit(files)

    def files(self, name: str, branch: str = "main") -> Files:
        """What a branch holds."""
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def asked(self, method: str = "") -> list[str]:
        """The paths of all requests so far."""
        return [r.path for r in self.requests if r.method == method or not method]

    def fetched(self) -> list[str]:
        """The files that were asked for, by name."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in self.asked("GET")
                if "/resolve/" in path]  # fmt: skip


def _start(handler: type[BaseHTTPRequestHandler], hub: Hub) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.hub = hub  # type: ignore[attr-defined]
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def _is_large(name: str) -> bool:
    return name.endswith(LARGE)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()


class _Base(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def request_told(self) -> Request:
        url = urlsplit(self.path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        return Request(self.command, unquote(url.path), token, parse_qs(url.query))

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str, data: bytes, headers: Mapping[str, str]) -> None:
        """A file's bytes, or those of its lie."""
        lie = self.hub.lies.get(name, Lie())
        data = data if lie.body is None else lie.body
        if lie.length and lie.cut is None:
            self.answer(200, data, headers)
            return
        self.close_connection = True
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        if lie.length:
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if lie.cut is None else data[: lie.cut])


class _StorageHandler(_Base):
    """The host of large files, which is another one than the Hub's."""

    def do_GET(self) -> None:
        request = self.request_told()
        self.hub.elsewhere.append(request)
        checksum, _, name = request.path.removeprefix("/large/").partition("/")
        self.send_file(name, self.hub.large.get(checksum, b""), {})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.hub.elsewhere.append(self.request_told())
        data = self.body()
        self.hub.large[_sha256(data)] = data
        self.answer(200)


class _Handler(_Base):
    """The Hub."""

    def do_GET(self) -> None:
        request = self.request_told()
        self.hub.requests.append(request)
        if self.hub.failing:
            self.answer(self.hub.failing)
        elif request.path.startswith("/api/models/"):
            self.model(request)
        else:
            self.resolve(request)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        request = self.request_told()
        self.hub.requests.append(request)
        body = self.body()
        path = request.path
        if self.hub.failing:
            self.answer(self.hub.failing)
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif not self.may_write(request):
            return
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        else:
            owner, name, action, revision = path.removeprefix("/api/models/").split("/", 3)
            repository = self.hub.repositories[f"{owner}/{name}"]
            if action == "branch":
                self.branch(repository, revision)
            elif action == "preupload":
                self.preupload(json.loads(body))
            elif action == "commit":
                self.commit(repository, f"{owner}/{name}", revision, body, request)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.answer(status, headers={"X-Error-Code": code, "X-Error-Message": message})

    def may_write(self, request: Request) -> bool:
        if request.token not in self.hub.tokens:
            self.refuse(401, message="Invalid credentials in Authorization header")
            return False
        if not self.hub.tokens[request.token]:
            self.refuse(403, message="you have no right to write here")
            return False
        return True

    def readable(self, request: Request, name: str) -> Repository | None:
        """A repository that the request may read; else it is answered."""
        repository = self.hub.repositories.get(name)
        if request.token is not None and request.token not in self.hub.tokens:
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif repository is None or (repository.private and request.token is None):
            self.refuse(404 if request.token else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and request.token != "hf_owner":
            self.refuse(403, "GatedRepo", "Access to this repository is restricted")
        else:
            return repository
        return None

    def found(self, repository: Repository, revision: str) -> str | None:
        commit = repository.branches.get(revision, revision)
        if commit in repository.commits:
            return commit
        self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return None

    def told(self, name: str, data: bytes) -> tuple[int, str]:
        """Size and checksum as the Hub tells them."""
        lie = self.hub.lies.get(name, Lie())
        checksum = _sha256(data) if _is_large(name) else _git(data)
        return len(data) if lie.size is None else lie.size, lie.checksum or checksum

    def model(self, request: Request) -> None:
        owner, name, *rest = request.path.removeprefix("/api/models/").split("/", 3)
        repository = self.readable(request, f"{owner}/{name}")
        if repository is None:
            return
        commit = self.found(repository, rest[1] if rest else "main")
        if commit is None:
            return
        if rest and rest[0] == "tree":
            self.tree(repository.commits[commit])
            return
        siblings: list[dict[str, Any]] = []
        for file, data in repository.commits[commit].items():
            size, checksum = self.told(file, data)
            entry: dict[str, Any] = {"rfilename": file}
            if "blobs" in request.query and self.hub.listed:
                entry |= {"size": size, "blobId": checksum}
                if _is_large(file):
                    pointer = {"size": size, "sha256": checksum, "pointerSize": 130}
                    entry |= {"blobId": _git(b"pointer"), "lfs": pointer}
            siblings.append(entry)
        told = {"id": f"{owner}/{name}", "sha": commit, "private": repository.private}
        self.answer_json({**told, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, files: Files) -> None:
        entries: list[dict[str, Any]] = []
        for file, data in files.items():
            size, checksum = self.told(file, data)
            entry: dict[str, Any] = {"type": "file", "path": file, "size": size, "oid": checksum}
            if _is_large(file):
                pointer = {"size": size, "oid": checksum, "pointerSize": 130}
                entry |= {"oid": _git(b"pointer"), "lfs": pointer}
            entries.append(entry)
        self.answer_json(entries)

    def resolve(self, request: Request) -> None:
        start, _, rest = request.path.removeprefix("/").partition("/resolve/")
        repository = self.readable(request, start)
        if repository is None:
            return
        # A revision may hold slashes, as the Hub's own package writes them.
        revision, _, file = rest.partition("/")
        commit = self.found(repository, revision)
        if commit is None:
            return
        data = repository.commits[commit].get(file)
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        size, checksum = self.told(file, data)
        headers = {"ETag": f'"{checksum}"', "X-Repo-Commit": commit}
        lie = self.hub.lies.get(file, Lie())
        target = lie.redirect
        if target is None and _is_large(file):
            self.hub.large[_sha256(data)] = data
            target = f"{self.hub.storage_address}/large/{_sha256(data)}/{file}"
        if target is not None:
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{checksum}"'}
            self.answer(302, headers={**headers, "Location": target})
        elif self.command == "HEAD":
            self.answer(200, headers={**headers, "Content-Length": str(size)})
        else:
            self.send_file(file, data, headers)

    def validate(self, content: str) -> None:
        front = content.split("---\n")[1] if content.startswith("---\n") else ""
        license = (yaml.safe_load(front) or {}).get("license", "mit")
        if license in ("mit", "apache-2.0", "other"):
            self.answer_json({"errors": [], "warnings": []})
        else:
            self.answer_json({"errors": [{"message": '"license" must be known'}]}, 400)

    def create(self, content: Mapping[str, Any]) -> None:
        name = f"{content['organization']}/{content['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            self.answer_json(url, 409)
            return
        private = content.get("visibility") == "private" or bool(content.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self.answer_json(url)

    def branch(self, repository: Repository, branch: str) -> None:
        if branch in repository.branches:
            self.answer(409)
            return
        repository.branches[branch] = repository.branches["main"]
        self.answer_json({})

    def preupload(self, content: Mapping[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in content["files"]
        ]
        self.answer_json({"files": modes})

    def batch(self, content: Mapping[str, Any]) -> None:
        objects = []
        for file in content["objects"]:
            entry = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.hub.large:
                href = f"{self.hub.storage_address}/large/{file['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        self.answer_json({"transfer": "basic", "objects": objects})

    def commit(
        self, repository: Repository, name: str, revision: str, body: bytes, request: Request
    ) -> None:
        pull = "create_pr" in request.query
        files = dict(repository.commits[repository.branches[revision]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        branch = f"refs/pr/{len(repository.pulls) + 1}" if pull else revision
        made = repository.commit(files, branch)
        url = f"{self.hub.endpoint}/{name}"
        told = {"commitUrl": f"{url}/commit/{made}", "commitOid": made, "success": True}
        if pull:
            repository.pulls.append(made)
            told["pullRequestUrl"] = f"{url}/discussions/{len(repository.pulls)}"
        self.answer_json(told)
