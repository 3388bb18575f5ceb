"""A small Hugging Face hub on this machine: what huggingface_hub asks of the real one to upload files.

It knows one token, and speaks git LFS for files that the real hub would keep there, so that what was sent before a
failure is known again. What it received is in :class:`FakeHub`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "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"

LARGE = (".safetensors", ".bin", ".png")


@dataclass
class Repo:
    """What a repository holds; ``commits`` are those that were made here."""

    is_private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class FakeHub:
    """The hub: its repositories, what was stored by hash, and every request.

    ``failures``: by the end of a path, the status with which such requests fail.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *words: Any) -> None:
        """Silence: tests look at what is printed."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        self.do_POST()

    def _answer(self, body: bytes) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.requests.append(f"{self.command} {path}")
        for end, status in self.hub.failures.items():
            if path.endswith(end):
                return self._send(status, {"error": f"refused, said the hub to {self.headers.get('Authorization')}"})
        if path.startswith("/lfs/"):
            return self._store(path.rpartition("/")[2], body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        return self._route(path, parse_qs(parts.query), body)

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path == "/api/validate-yaml":
            return self._send(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            is_private = asked.get("private") is True or asked.get("visibility") == "private"
            self.hub.repos[name] = Repo(is_private)
            return self._send(200, {"url": f"{self.hub.url}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        _, _, _, owner, leaf, *rest = path.split("/")
        repo = self.hub.repos.get(f"{owner}/{leaf}")
        if repo is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if not rest:
            return self._send(200, self._described(f"{owner}/{leaf}", repo))
        if rest[1] not in ("main", "dev"):
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in asked
            ]
            return self._send(200, {"files": modes})
        return self._commit(f"{owner}/{leaf}", repo, rest[1], query.get("create_pr") == ["1"], body)

    def _described(self, name: str, repo: Repo) -> dict[str, Any]:
        siblings = []
        for path, content in repo.files.items():
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 134}} if path.endswith(LARGE) else {}
            siblings.append({"rfilename": path, "size": len(content), "blobId": digest[:40], **lfs})
        return {"id": name, "modelId": name, "private": repo.is_private, "sha": "0" * 40, "siblings": siblings}

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            known = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.stored:
                known["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(known)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, digest: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.stored[digest] = body
        self.hub.sent.append(digest)
        self._send(200, {})

    def _commit(self, name: str, repo: Repo, revision: str, is_pull_request: bool, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        header = next(line["value"] for line in lines if line["key"] == "header")
        repo.commits.append({"files": files, "pr": is_pull_request, "revision": revision, **header})
        if not is_pull_request:
            repo.files |= files
        oid = "c" * 40
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        self._send(200, answer)

    def _send(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that runs for as long as the context lasts."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
