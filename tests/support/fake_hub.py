"""A Hugging Face Hub on this machine: creates repositories, takes commits, gives files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_right"
SHA = "0" * 40


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory.

    repositories: USER/NAME -> path -> content. requests: (method, path) in order.
    broken: a part of a path of which requests are answered with status 400.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: str | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def point_to(monkeypatch, endpoint: str, token: str | None, home: Path) -> None:
    """Have huggingface_hub, which reads its environment when it is imported, use a server."""
    from huggingface_hub import constants

    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A server that runs within the block."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._noted()
        if self._is_refused(path):
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(repo, {})
            self._answer({"url": f"{self.server.endpoint}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in files
                    ]
                }
            )
        elif "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    content = base64.b64decode(value["content"])
                    self.server.repositories[repo][value["path"]] = content
            self._answer(
                {
                    "commitUrl": f"{self.server.endpoint}/{repo}/commit/{SHA}",
                    "commitOid": SHA,
                    "hookOutput": "",
                }
            )
        else:
            self._answer({"error": path}, 404)

    def do_GET(self, is_head: bool = False) -> None:
        path = self._noted()
        words = path.strip("/").split("/")
        repo = "/".join(words[2:4]) if words[0] == "api" else "/".join(words[:2])
        files = self.server.repositories.get(repo)
        if self.server.broken is not None and self.server.broken in path:
            self._answer({"error": "broken"}, 400)
        elif files is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif words[0] == "api" and len(words) > 4 and words[4] == "tree":
            self._answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                    for name, data in files.items()
                ]
            )
        elif words[0] == "api":
            names = [{"rfilename": name} for name in files]
            self._answer({"id": repo, "sha": SHA, "siblings": names, "private": False})
        else:
            data = files["/".join(words[4:])]
            more = {"X-Repo-Commit": SHA, "ETag": f'"{_oid(data)}"'}
            self._answer(data, 200, more, is_head)

    def do_HEAD(self) -> None:
        self.do_GET(is_head=True)

    def _noted(self) -> str:
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append((self.command, path))
        return path

    def _is_refused(self, path: str) -> bool:
        if self.server.broken is not None and self.server.broken in path:
            self._answer({"error": "broken"}, 400)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        else:
            return False
        return True

    def _answer(self, content: object, status: int = 200, more=None, is_head: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
