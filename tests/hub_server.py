"""A small Hub on this computer: as much of its HTTP interface as pushing to and loading from a model repository needs.

    with HubServer() as hub:
        hub.add_user("me", "hf_write")
        environment = hub.environment("hf_write", home)  # for a process that is to take it for the Hub

It keeps repositories in memory as lists of commits, and everything that it was sent in `requests`. `fail` makes it fail
where a test wants. Large files go by Git LFS's basic transfer: HF_HUB_DISABLE_XET is set in `environment`, for Xet's
protocol is in a compiled library of its own. What it does not know it answers with 501 and keeps in `unknown`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "openrail++", "other"}
TEXT = {".md", ".json", ".py", ".txt", ".gitattributes"}  # every other file goes by LFS


class Refusal(Exception):
    """An answer with an error: status, the Hub's X-Error-Code (or None), and message."""


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=list)  # the files after each commit, first to last

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, index: int = -1) -> str:
        index %= len(self.commits)
        content = "".join(name + hashlib.sha1(data).hexdigest() for name, data in sorted(self.commits[index].items()))
        return hashlib.sha1(f"{index}{content}".encode()).hexdigest()


class HubServer:
    def __init__(self):
        self.users: dict[str, tuple[str, str]] = {}  # by token: name and role
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bytes]] = []  # method, path and body
        self.unknown: list[str] = []
        self.fail: dict[str, int | None] = {}  # a part of a path, and the status to answer with; None: hang up
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add_user(self, name: str, token: str, role: str = "write") -> None:
        self.users[token] = (name, role)

    def add_repository(
        self, repo_id: str, files: dict[str, bytes] | Path | None = None, private: bool = False
    ) -> None:
        """A repository as another hand might have made it, with the files of a folder or a dictionary."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.repositories[repo_id] = Repository(private, [first | (files or {})])

    def environment(self, token: str | None, home: Path) -> dict[str, str]:
        """Variables for a process with a cache of its own, logged in with the token, to which this is the Hub."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        own |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "ACCELERATE_USE_CPU": "true", "NO_PROXY": "*", "no_proxy": "*"}
        return own | ({"HF_TOKEN": token} if token else {})


class Handler(BaseHTTPRequestHandler):
    """One request. `hub` is the server's state."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.read_chunks()
        self.hub.requests.append((self.command, path, body))
        for part, status in self.hub.fail.items():
            if part in path:
                if status is None:
                    self.close_connection = True
                    return
                self.answer({"error": "Simulated."}, status, {"X-Error-Message": "Simulated."})
                return
        for pattern, method in ROUTES:
            found = re.fullmatch(f"{self.command} {pattern}", f"{self.command} {path}")
            if found and self.command in method.methods:
                try:
                    method(self, body, **found.groupdict())
                except Refusal as refusal:
                    status, code, message = refusal.args
                    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
                    self.answer({"error": message}, status, headers)
                return
        self.hub.unknown.append(f"{self.command} {self.path}")
        self.answer({"error": "This small server does not know that."}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_chunks(self) -> bytes:
        data = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return data

    def answer(self, content: dict | list | bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for what.

    def user(self, *, needed: bool = True) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        if needed and not token:
            raise Refusal(401, None, "Invalid username or password.")
        return self.hub.users.get(token)

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        user, repository = self.user(needed=write), self.hub.repositories.get(repo_id)
        mine = user is not None and user[0] == repo_id.split("/")[0]
        if repository is None or (repository.private and not mine):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (mine and user[1] == "write"):
            raise Refusal(403, None, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def commit_index(self, repository: Repository, revision: str) -> int:
        known = {repository.sha(i): i for i in range(len(repository.commits))} | {"main": len(repository.commits) - 1}
        if revision not in known:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return known[revision]

    # Answers.

    def whoami(self, _) -> None:
        name, role = self.user()
        token = {"displayName": "test", "role": role}
        self.answer({"type": "user", "name": name, "fullname": name, "orgs": [], "auth": {"accessToken": token}})

    def create(self, body: bytes) -> None:
        (name, role), wanted = self.user(), json.loads(body)
        owner = wanted.get("organization") or name
        repo_id = f"{owner}/{wanted['name']}"
        if owner != name or role != "write":
            message = f"You don't have the rights to create a model under the namespace {owner!r}"
            raise Refusal(403, None, message)
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0"}
        if repo_id in self.hub.repositories:
            self.answer({"error": "You already created this model repo", **url}, 409)
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.add_repository(repo_id, private=bool(private))
        self.answer(url)

    def info(self, _, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(repo_id)
        index = self.commit_index(repository, revision)
        names = [{"rfilename": name} for name in repository.commits[index]]
        content = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": repository.sha(index), "tags": []}
        content |= {"private": repository.private, "siblings": names, "author": repo_id.split("/")[0]}
        self.answer({**content, "gated": False, "disabled": False, "downloads": 0, "likes": 0})

    def tree(self, _, repo_id: str, revision: str, folder: str = "") -> None:
        repository = self.repository(repo_id)
        files = repository.commits[self.commit_index(repository, revision)]
        found = {n: d for n, d in files.items() if not folder or n.startswith(f"{folder}/")}
        if folder and not found:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        self.answer([self.entry(name, data) for name, data in found.items()])

    @staticmethod
    def entry(name: str, data: bytes) -> dict:
        entry = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
        if Path(name).suffix not in TEXT and name not in TEXT:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self.repository(repo_id, write=True)
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "regular" if Path(name).suffix in TEXT else "lfs" for name in names}
        self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self.repository(repo_id, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            actions["verify"] = {"href": f"{self.hub.url}/verify/{repo_id}"}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.blobs else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, None, "The content is not what was announced")
        self.hub.blobs[oid] = body
        self.answer(b"")

    def lfs_verify(self, body: bytes, repo_id: str) -> None:
        said = json.loads(body)
        if len(self.hub.blobs.get(said["oid"], b"")) != said["size"]:
            raise Refusal(404, None, "No such object")
        self.answer({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        files = dict(repository.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append(files)
        url = f"{self.hub.url}/{repo_id}/commit/{repository.sha()}"
        self.answer({"success": True, "commitOid": repository.sha(), "commitUrl": url, "hookOutput": ""})

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        data = yaml.safe_load(re.match(r"---\n(.*?)\n---", content, re.S).group(1))
        wrong = [
            f'"{k}" must be a string' for k in ("library_name", "instance_prompt") if not isinstance(data[k], str)
        ]
        if data.get("license", "other") not in LICENSES:
            wrong.append(f'"license" must be one of {sorted(LICENSES)}')
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
            wrong.append('"base_model" with value is not valid. Use a model id from https://hf.co/models.')
        errors = [{"message": message} for message in wrong]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def resolve(self, _, repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id)
        index = self.commit_index(repository, revision)
        headers = {"X-Repo-Commit": repository.sha(index)}
        if name not in repository.commits[index]:
            self.answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        data = repository.commits[index][name]
        self.answer(data, headers={**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "none"})


MODEL, REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = []
for methods, pattern, method in [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{MODEL}", Handler.info),
    ("GET", f"/api/models/{MODEL}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{MODEL}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    ("POST", f"/api/models/{MODEL}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{MODEL}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/{MODEL}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", f"/verify/{MODEL}", Handler.lfs_verify),
    ("GET HEAD", f"/{MODEL}/resolve/{REVISION}/(?P<name>.+)", Handler.resolve),
]:
    method.methods = methods.split()
    ROUTES.append((pattern, method))
