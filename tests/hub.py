"""A server that speaks as much of the Hub as uploading needs, and keeps what it is given."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """What has been uploaded.

    Args:
        url: where the server listens.
        token: what it wants to see.
        repositories: by "models/owner/name" or "spaces/owner/name": how they were created.
        files: by repository: contents by path.
        authorizations: every Authorization header that came.
    """

    url: str = ""
    token: str = ""
    repositories: dict[str, dict] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    authorizations: set[str | None] = field(default_factory=set)


@contextmanager
def local_hub(token: str) -> Iterator[Hub]:
    """Run the server on this machine."""
    hub = Hub(token=token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self._body()
        self.hub.authorizations.add(self.headers["Authorization"])
        if self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":  # the metadata of a card
            return self._answer(200, {"errors": [], "warnings": []})
        for pattern, answer in (
            (r"/api/(models|spaces)/([^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/(?:(spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/api/(models|spaces)/([^/]+/[^/]+)/commit/main", self._commit),
        ):
            if found := re.fullmatch(pattern, self.path.partition("?")[0]):
                return answer(f"{found[1] or 'models'}/{found[2]}", body)
        return self._answer(404, {"error": f"no {self.path} here"})

    def do_PUT(self) -> None:
        """The upload of a large file; its address needs no token."""
        body = self._body()
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.hub.blobs[self.path.rpartition("/")[2]] = body
        self._answer(200, {})

    def _create(self, asked: dict) -> None:
        kind = asked.get("type", "model") + "s"
        repository = f"{kind}/{asked['organization']}/{asked['name']}"
        known = repository in self.hub.repositories
        self.hub.repositories.setdefault(repository, asked)
        self.hub.files.setdefault(repository, {})
        prefix = "spaces/" if kind == "spaces" else ""
        url = f"{self.hub.url}/{prefix}{asked['organization']}/{asked['name']}"
        self._answer(409 if known else 200, {"url": url})

    def _preupload(self, repository: str, body: bytes) -> None:
        """Weights are large files, the rest goes into the commit."""
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _lfs_batch(self, repository: str, body: bytes) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.hub.files[repository]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        url = f"{self.hub.url}/{repository}/commit/{'0' * 40}"
        self._answer(200, {"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def _answer(self, status: int, content: dict) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        pass
