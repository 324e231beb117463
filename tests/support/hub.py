"""A stand-in for the Hugging Face hub on 127.0.0.1: repositories, commits, files by HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml


@dataclass
class Hub:
    """What the hub holds, and what it was asked for."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuses: int = 0  # a status that every answer has, 0 for none
    hides_sizes: bool = False
    claimed: int | None = None  # the size that is announced of every file
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    private: dict[str, Any] = field(default_factory=dict)
    commits: int = 0

    @property
    def commit(self) -> str:
        """Of the newest state."""
        return f"{self.commits:040x}"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else ""
            name = name or asked["name"]
            self.hub.private[name] = asked.get("private", asked.get("visibility"))
            existing = name in self.hub.files
            self.hub.files.setdefault(name, {})
            answer = {"url": f"{self.hub.address}/{name}", "name": name, "id": name}
            self._json(answer, 409 if existing else 200)
        elif self.path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(head), dict)
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", self.path):
            names = [x["path"] for x in json.loads(body)["files"]]
            self._json(
                {"files": [{"path": x, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                           for x in names]}
            )  # fmt: skip
        elif found := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", self.path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.hub.files[found[1]][entry["value"]["path"]] = content
            self.hub.commits += 1
            url = f"{self.hub.address}/{found[1]}/commit/{self.hub.commit}"
            self._json(
                {
                    "success": True,
                    "commitUrl": url,
                    "commitOid": self.hub.commit,
                    "pullRequestUrl": None,
                }
            )
        else:
            self._json({"error": "Not Found"}, 404)

    def do_GET(self) -> None:
        self._file(send=True)

    def do_HEAD(self) -> None:
        self._file(send=False)

    def _file(self, *, send: bool) -> None:
        if self._refused():
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if not found:
            return self._json({"error": "Not Found"}, 404, send=send)
        name, revision, file = found.groups()
        if name not in self.hub.files:
            return self._json({}, 404, {"X-Error-Code": "RepoNotFound"}, send=send)
        if revision not in ("main", self.hub.commit):
            return self._json({}, 404, {"X-Error-Code": "RevisionNotFound"}, send=send)
        if file not in self.hub.files[name]:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound"}, send=send)
        data = self.hub.files[name][file]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        size = len(data) if self.hub.claimed is None or send else self.hub.claimed
        if not (self.hub.hides_sizes and not send):
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if send:
            self.wfile.write(data)

    def _refused(self) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        if self.hub.refuses:
            self._json({"error": "no"}, self.hub.refuses, send=self.command != "HEAD")
        return bool(self.hub.refuses)

    def _json(
        self, answer: Any, status: int = 200, headers: Any = None, *, send: bool = True
    ) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if send:
            self.wfile.write(data)


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
