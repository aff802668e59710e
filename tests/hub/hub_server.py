"""A stand-in for the Hub in memory: the part of its HTTP API that pushing a model and loading it again speak.

Point `HF_ENDPOINT` at `Hub.url` before huggingface_hub is imported, and set `HF_HUB_DISABLE_XET=1`: large files then
come as Git LFS objects over plain HTTP.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER = "me"
# Of these the Hub wants LFS objects whatever their size.
LARGE = (".safetensors", ".bin", ".pt", ".pth")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Commit:
    """What one push changed, and all files as they then were, by path."""

    oid: str
    message: str
    revision: str
    changed: tuple[str, ...]
    files: dict[str, bytes]


@dataclass
class Repo:
    """The branches of a repository as their newest commits, and all commits in the order they came."""

    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)

    def add(self, message: str, revision: str, files: dict[str, bytes], changed: tuple[str, ...]) -> Commit:
        oid = hashlib.sha1(f"{message} {revision} {len(self.commits)}".encode()).hexdigest()
        self.branches[revision] = commit = Commit(oid, message, revision, changed, files)
        self.commits.append(commit)
        return commit

    def find(self, revision: str) -> Commit:
        found = self.branches.get(revision) or next((c for c in self.commits if c.oid == revision), None)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    @property
    def files(self) -> dict[str, bytes]:
        """What `main` holds."""
        return self.branches["main"].files

    @property
    def pushes(self) -> list[Commit]:
        """The commits after the empty one that a repository begins with."""
        return self.commits[1:]


class HubError(Exception):
    """An answer of the Hub that is no success."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


def oid_of(path: str, content: bytes) -> str:
    """The hash the Hub knows a file by: SHA-256 of an LFS object, else Git's of a blob."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """The Hub's state, and its answers.

    Attributes:
        repos: by name, such as `me/student`.
        requests: `METHOD path` of each, as they came.
        bodies: of the same requests.
        tokens: that came with any of them.
        read_only: names of repositories that nobody may write to.
        failures: statuses to answer with, one a request, before the pattern that a request's `METHOD path` begins with
            is served again.
    """

    def __init__(self) -> None:
        self.url = self.storage = ""
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.tokens: set[str] = set()
        self.read_only: set[str] = set()
        self.failures: dict[str, list[int]] = {}
        self.large: dict[str, bytes] = {}
        self.lock = threading.RLock()

    def repo(self, name: str, *, user: str | None) -> Repo:
        """The repository, if the user may see it."""
        found = self.repos.get(name)
        if found is None or (found.private and user is None):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def create(self, body: dict[str, Any], **_: Any) -> Any:
        owner = body.get("organization") or USER
        if owner != USER:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{body['name']}"
        url = f"{self.url}/{name}"
        if name in self.repos:
            raise HubError(409, "You already created this model repo", url=url)
        self.repos[name] = repo = Repo(private=body.get("visibility") == "private")
        repo.add("initial commit", "main", {}, ())
        return {"url": url, "name": name, "id": name}

    def create_branch(self, repo: Repo, revision: str, **_: Any) -> Any:
        repo.branches[revision] = repo.branches["main"]
        return {}

    def check_write(self, name: str, **_: Any) -> Any:
        if name in self.read_only:
            raise HubError(403, f"You don't have write access to {name}")
        return {}

    def check_card(self, body: dict[str, Any], **_: Any) -> Any:
        head = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        try:
            data = yaml.safe_load(head[1]) if head else {}
        except yaml.YAMLError as error:
            raise HubError(400, f"Invalid metadata in README.md: {error}") from error
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

    def preupload(self, repo: Repo, revision: str, body: dict[str, Any], **_: Any) -> Any:
        there = repo.find(revision).files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": oid_of(file["path"], there[file["path"]]) if file["path"] in there else None,
                }
                for file in body["files"]
            ]
        }

    def batch(self, body: dict[str, Any], **_: Any) -> Any:
        objects = []
        for wanted in body["objects"]:
            actions = {"upload": f"{self.url}/lfs/{wanted['oid']}", "verify": f"{self.url}/lfs-verify"}
            new = wanted["oid"] not in self.large
            objects.append({**wanted, **({"actions": {k: {"href": v} for k, v in actions.items()}} if new else {})})
        return {"transfer": "basic", "objects": objects}

    def put(self, oid: str, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, f"The content is not {oid}")
        self.large[oid] = body
        return {}

    def verify(self, body: dict[str, Any], **_: Any) -> Any:
        if len(self.large.get(body["oid"], b"")) != body["size"]:
            raise HubError(422, f"{body['oid']} was not uploaded whole")
        return {}

    def commit(self, repo: Repo, revision: str, body: bytes, name: str, **_: Any) -> Any:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        new = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                new[value["path"]] = self.large[value["oid"]]
            elif operation["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            else:
                raise HubError(400, f"A stand-in knows no {operation['key']}")
        files = {**repo.find(revision).files, **new}
        made = repo.add(header["value"]["summary"], revision, files, tuple(sorted(new)))
        return {"commitUrl": f"{self.url}/{name}/commit/{made.oid}", "commitOid": made.oid, "success": True}

    def info(self, repo: Repo, name: str, revision: str = "main", **_: Any) -> Any:
        at = repo.find(revision)
        siblings = [{"rfilename": path} for path in sorted(at.files)]
        return {"id": name, "sha": at.oid, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, repo: Repo, revision: str, folder: str = "", **_: Any) -> Any:
        files = repo.find(revision).files
        inside = {path: content for path, content in sorted(files.items()) if path.startswith(folder)}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return [_entry(path, content) for path, content in inside.items()]

    def resolve(self, repo: Repo, revision: str, path: str, **_: Any) -> Any:
        at = repo.find(revision)
        if path not in at.files:
            raise HubError(404, f"{path} is not in this repository", "EntryNotFound")
        content = at.files[path]
        headers = {"X-Repo-Commit": at.oid, "ETag": f'"{oid_of(path, content)}"'}
        if path.endswith(LARGE):  # these lie on another host
            oid = oid_of(path, content)
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return 302, b"", {**headers, "Location": f"{self.storage}/lfs/{oid}"}
        return 200, content, headers

    def get(self, oid: str, **_: Any) -> Any:
        return 200, self.large[oid], {"ETag": f'"{oid}"'}

    def who(self, **_: Any) -> Any:
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, bytes, dict[str, str]]:
        """The status, the content and the headers of a request's answer."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            self.bodies.append(body)
            self.tokens |= {token} - {None}
            for pattern, statuses in self.failures.items():
                if re.match(pattern, f"{method} {path}") and statuses:
                    raise HubError(statuses.pop(0), "The Hub was told to fail")
            for own_method, pattern, make in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method in own_method:
                    return self._serve(make, found.groupdict(), body, token, writes=method in ("POST", "PUT"))
        raise HubError(404, f"A stand-in knows no {method} {path}")

    def _serve(self, make: Callable, found: dict, body: bytes, token: str | None, *, writes: bool) -> Any:
        # LFS links are signed and come without a token.
        if token is None and writes and "oid" not in found:
            raise HubError(401, "Invalid username or password.")
        values: dict[str, Any] = {key: unquote(value) for key, value in found.items() if value is not None}
        if "repo" in values:
            values["name"] = values["repo"]
            values["repo"] = self.repo(values["name"], user=token and USER)
            if writes:
                self.check_write(values["name"])
        is_raw = make in (Hub.commit, Hub.put)
        result = make(self, body=body if is_raw else json.loads(body or b"{}"), **values)
        return result if isinstance(result, tuple) else (200, json.dumps(result).encode(), {})


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 127}
    return entry


ROUTES = (
    ("GET", "/api/whoami-v2", Hub.who),
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.check_card),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Hub.put),
    ("GET HEAD", "/lfs/(?P<oid>[0-9a-f]+)", Hub.get),
    ("POST", "/lfs-verify", Hub.verify),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Hub.commit),
    ("POST", f"/api/models/{REPO}/branch/(?P<revision>[^/]+)", Hub.create_branch),
    ("GET", f"/api/models/{REPO}/auth-check/write", Hub.check_write),
    ("GET", f"/api/models/{REPO}", Hub.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Hub.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Hub.tree),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.resolve),
)


class Handler(BaseHTTPRequestHandler):
    """HTTP around `Hub.answer`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing: tests read `Hub.requests`."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _serve(self) -> None:
        body, token = self._body(), self.headers.get("Authorization")
        try:
            status, content, headers = self.hub.answer(self.command, urlsplit(self.path).path, body, token)
        except HubError as refusal:
            content = json.dumps({"error": str(refusal), **refusal.more}).encode()
            status, headers = refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the names that http.server calls


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub of its own on a free port of this machine, while open."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfOne", (Handler,), {"hub": hub}))
    port = server.server_address[1]
    hub.url, hub.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"  # of other hosts headers differ
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
