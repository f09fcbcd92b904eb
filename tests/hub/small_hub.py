"""A Hub in one process: as much of its HTTP interface as pushing and pulling a model needs, and faults on demand."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"
TOKENS = {"", TOKEN, "hf_reader", "hf_guest"}  # the last may write, too, but has no access to what is gated


class SmallHub(ThreadingHTTPServer):
    """Serves on a free port of this machine; a context manager.

    Attributes:
        repos: by name: `files` (name to bytes), `private`, `gated` and the number of `commits`.
        objects: large files by hash, as they arrived.
        faults: what to do wrong, each this many times: "drop upload" (close the connection in the middle of a large
            file), "drop commit", "fail commit" (status 500), "bad header" (of a card), "drop download NAME" (close the
            connection in the middle of the weights of this repository).
        requests: how often each method and route was called.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "SmallHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def create(self, name: str, private: bool = False, gated: bool = False) -> dict[str, Any]:
        self.repos[name] = {"files": {}, "private": private, "gated": gated, "commits": 0}
        return self.repos[name]

    def happens(self, fault: str) -> bool:
        """Whether it is time for this fault once more."""
        if not self.faults[fault]:
            return False
        self.faults[fault] -= 1
        return True


class Handler(BaseHTTPRequestHandler):
    server: SmallHub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/main)?", "info"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/(\w+)", "upload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", "commit"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", "file"),
        ("GET", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", "file"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/main.*", "tree"),
    )

    def log_message(self, *_: object) -> None:
        """Nothing: tests are quiet."""

    def handle_any(self) -> None:
        path = self.path.partition("?")[0]
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                self.server.requests[name] += 1
                getattr(self, name)(*match.groups())
                return
        self.answer({"error": f"no route for {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    # ------------------------------------------------------------------------------------------ answers
    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.body()
        self.answer({"error": message or code}, status, X_Error_Code=code, X_Error_Message=message or code)

    def drop(self) -> None:
        """Close the connection without an answer."""
        self.close_connection = True
        self.connection.close()

    def allowed(self, repo: str | None = None, write: bool = False) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        held = self.server.repos.get(repo) if repo else None
        if repo and held is None:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif token not in TOKENS or (write and not token):
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif write and token == "hf_reader":
            self.refuse(403, message="you are not allowed to write here")
        elif held and held["gated"] and token != TOKEN:
            self.refuse(403, "GatedRepo", "Access to this repository is restricted")
        else:
            return True
        return False

    # ------------------------------------------------------------------------------------------ writing
    def create(self) -> None:
        if not self.allowed(write=True):
            return
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            self.answer({"error": "You already created this model repo", **url}, 409)
        else:
            self.server.create(name, asked.get("private") or asked.get("visibility") == "private")
            self.answer(url)

    def validate(self) -> None:
        self.body()
        if self.server.happens("bad header"):
            self.answer({"warnings": [], "errors": [{"message": "license is unknown"}]}, 400)
        else:
            self.answer({"warnings": [], "errors": []})

    def preupload(self, repo: str) -> None:
        if not self.allowed(repo, write=True):
            return
        files = [{"path": f["path"], **_mode(f["path"])} for f in json.loads(self.body())["files"]]
        self.answer({"files": files})

    def batch(self, repo: str) -> None:
        if not self.allowed(repo, write=True):
            return
        objects = []
        for entry in json.loads(self.body())["objects"]:
            place = {"upload": {"href": f"{self.server.url}/objects/{entry['oid']}", "header": {}}}
            objects.append(entry if entry["oid"] in self.server.objects else {**entry, "actions": place})
        content = {"transfer": "basic", "objects": objects}
        self.answer(json.dumps(content).encode(), Content_Type="application/vnd.git-lfs+json")

    def upload(self, oid: str) -> None:
        if self.server.happens("drop upload"):
            self.rfile.read(100)
            self.drop()
            return
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.answer({})

    def commit(self, repo: str) -> None:
        if not self.allowed(repo, write=True):
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        if self.server.happens("drop commit"):
            self.drop()
            return
        if self.server.happens("fail commit"):
            self.answer({"error": "out of order"}, 500)
            return
        held = self.server.repos[repo]
        for line in lines:
            entry = line["value"]
            if line["key"] == "file":
                held["files"][entry["path"]] = base64.b64decode(entry["content"])
            elif line["key"] == "lfsFile":
                held["files"][entry["path"]] = self.server.objects[entry["oid"]]
        held["commits"] += 1
        oid = _revision(held)
        url = f"{self.server.url}/{repo}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # ------------------------------------------------------------------------------------------ reading
    def info(self, repo: str) -> None:
        if not self.allowed(repo):
            return
        held = self.server.repos[repo]
        siblings = [{"rfilename": name} for name in held["files"]]
        facts = {"id": repo, "sha": _revision(held), "private": held["private"], "siblings": siblings, "tags": []}
        self.answer({**facts, "downloads": 0, "likes": 0})

    def tree(self, repo: str) -> None:
        if not self.allowed(repo):
            return
        files = self.server.repos[repo]["files"].items()
        self.answer([{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files])

    def file(self, repo: str, name: str) -> None:
        if not self.allowed(repo):
            return
        held = self.server.repos[repo]
        if name not in held["files"]:
            self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=_revision(held))
            return
        content = held["files"][name]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"X_Repo_Commit": _revision(held), "ETag": etag, "Accept_Ranges": "bytes"}
        if start:
            self.server.requests["resumed download"] += 1
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        if self.command == "GET" and name.endswith(".safetensors") and self.server.happens(f"drop download {repo}"):
            self.answer(rest[: len(rest) // 2], 206 if start else 200, **headers, **{"Content-Length": str(len(rest))})
            self.close_connection = True
            return
        self.answer(rest, 206 if start else 200, **headers)


def _mode(path: str) -> dict[str, Any]:
    return {"uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}


def _revision(held: dict[str, Any]) -> str:
    return f"{held['commits']:040x}"
