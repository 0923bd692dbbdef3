"""A fake of the Hugging Face Hub on the loopback interface: repositories, commits with a parent, LFS, tokens.

It speaks what ``huggingface_hub`` asks for when it publishes and downloads; set ``HF_HUB_DISABLE_XET=1`` beside it.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers import serving

TOKEN = "hf_test"
NAMESPACE = "org"
"""The only one that the token may write."""
PART = 2**16


@dataclass
class Commit:
    """A state of a repository."""

    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[Commit]

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def add(self, title: str, files: dict[str, bytes]) -> Commit:
        """A commit whose files are ``files``, all of them."""
        commit = Commit(hashlib.sha1(f"{title} {len(self.commits)}".encode()).hexdigest(), title, files)
        self.commits.append(commit)
        return commit


@dataclass
class FakeHub:
    """``before_upload`` is called when a large file has arrived, ``before_commit`` with the repository when a commit has; ``broken`` makes every answer a 503.

    ``delay`` is waited before an answer (seconds). A ``mute`` hub does what it is asked and hangs up without an answer.
    While ``speaks`` is cleared, the hub accepts requests and answers none. ``asked`` are the paths that were asked for,
    and ``sent`` counts the bytes of the answers that were taken.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    before_upload: Callable[[], None] = lambda: None
    before_commit: Callable[[Repository], None] = lambda repository: None
    after_commit: Callable[[Repository], None] = lambda repository: None
    broken: bool = False
    delay: float = 0.0
    mute: bool = False
    speaks: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    sent: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def create(self, repo_id: str, private: bool = True, files: dict[str, bytes] | None = None) -> Repository:
        repository = Repository(private, [])
        repository.add("initial commit", {".gitattributes": b"", **(files or {})})
        self.repositories[repo_id] = repository
        return repository


@contextmanager
def running() -> Iterator[FakeHub]:
    """A hub that answers at ``url`` while the context lasts."""
    hub = FakeHub()
    hub.speaks.set()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with serving(Handler) as hub.url:
        try:
            yield hub
        finally:
            hub.speaks.set()


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            try:
                for start in range(0, len(body), PART):
                    self.wfile.write(body[start : start + PART])
                    self.hub.sent += len(body[start : start + PART])
            except ConnectionError:
                self.close_connection = True

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, self.extra = unquote(urlsplit(self.path).path), {}
        self.hub.asked.append(path)
        time.sleep(self.hub.delay)
        self.hub.speaks.wait()
        try:
            if self.hub.broken:
                raise _Refusal(503)
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.hub.lock:
                        result = action(self, body, **match.groupdict())
                    if self.hub.mute:
                        self.close_connection = True
                        return None
                    if isinstance(result, bytes):
                        return self._answer(200, result, self.extra)
                    return self._answer(200, json.dumps(result).encode(), {"Content-Type": "application/json"})
            raise _Refusal(404)
        except _Refusal as refusal:
            self._answer(refusal.status, b"{}", {"X-Error-Code": refusal.code} if refusal.code else None)

    do_GET = do_HEAD = do_POST = do_PUT = _handle
    extra: dict[str, str]

    def _check(self, repo_id: str | None = None, write: bool = False) -> None:
        if self.headers.get("Authorization") is None and repo_id is not None:
            raise _Refusal(401, "RepoNotFound")  # all repositories are private
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refusal(401)
        if write and repo_id is not None and repo_id.split("/")[0] != NAMESPACE:
            raise _Refusal(403)

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        self._check(repo_id, write)
        if repo_id not in self.hub.repositories:
            raise _Refusal(404, "RepoNotFound")
        return self.hub.repositories[repo_id]

    def _commit_of(self, repo_id: str, revision: str) -> Commit:
        repository = self._repository(repo_id)
        if revision == "main":
            return repository.head
        for commit in repository.commits:
            if commit.sha == revision:
                return commit
        raise _Refusal(404, "RevisionNotFound")

    def whoami(self, body: bytes) -> Any:
        self._check()
        return {"type": "user", "name": "tester", "orgs": [{"name": NAMESPACE, "roleInOrg": "write"}], "auth": {}}

    def create(self, body: bytes) -> Any:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or 'tester'}/{request['name']}"
        self._check(repo_id, write=True)
        if repo_id in self.hub.repositories:
            raise _Refusal(409)
        self.hub.create(repo_id, request.get("private", False) or request.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{repo_id}"}

    def info(self, body: bytes, repo: str, revision: str = "main") -> Any:
        commit = self._commit_of(repo, revision)
        siblings = [{"rfilename": name} for name in commit.files]
        return {"id": repo, "sha": commit.sha, "private": self.hub.repositories[repo].private, "siblings": siblings}

    def commits(self, body: bytes, repo: str, revision: str) -> Any:
        self._commit_of(repo, revision)
        date = "2026-01-01T00:00:00.000Z"
        return [
            {"id": commit.sha, "authors": [], "date": date, "title": commit.title, "message": ""}
            for commit in reversed(self.hub.repositories[repo].commits)
        ]

    def tree(self, body: bytes, repo: str, revision: str) -> Any:
        files = self._commit_of(repo, revision).files
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]

    def validate_yaml(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        self._repository(repo, write=True)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, body: bytes, repo: str) -> Any:
        self._repository(repo, write=True)
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.before_upload()
        self.hub.blobs[oid] = body
        return {}

    def commit(self, body: bytes, repo: str, revision: str) -> Any:
        repository = self._repository(repo, write=True)
        self.hub.before_commit(repository)
        header, *operations = (json.loads(line) for line in body.splitlines())
        if header["value"].get("parentCommit") not in (None, repository.head.sha):
            raise _Refusal(412)
        files = dict(repository.head.files)
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        made = repository.add(header["value"]["summary"], files)
        self.hub.after_commit(repository)
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{made.sha}", "commitOid": made.sha, "pullRequestUrl": None}

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> Any:
        commit = self._commit_of(repo, revision)
        if name not in commit.files:
            raise _Refusal(404, "EntryNotFound")
        content = commit.files[name]
        self.extra = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit.sha}
        return content


_REPO = r"(?P<repo>(?:[^/]+/)?[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Any]]] = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), f"/api/models/{_REPO}", _Handler.info),
    (("GET",), f"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    (("GET",), f"/api/models/{_REPO}/commits/{_REVISION}", _Handler.commits),
    (("GET",), f"/api/models/{_REPO}/tree/{_REVISION}/?", _Handler.tree),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    (("POST",), f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_put),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", _Handler.resolve),
]
