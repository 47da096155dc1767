"""A small server that speaks the hub's protocol on this machine: repositories are folders, some gated."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `repositories` (id -> folder); `gated` ids are refused; every answered path is kept in `served`.

    `served_of` has them by repository. `sent` counts the bytes of each file that went out, `listed` how often the files
    of a repository were asked for.
    """

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.gated = gated
        self.served: list[tuple[str, str, str | None]] = []
        self.served_of: defaultdict[str, list[tuple[str, str, str | None]]] = defaultdict(list)
        self.sent: Counter[str] = Counter()
        self.listed: Counter[str] = Counter()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo_id = "/".join(parts[2:4] if api else parts[:2])
        folder = self.server.repositories.get(repo_id)
        if repo_id in self.server.gated:
            return self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if folder is None:
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if api:
            self.server.listed[repo_id] += parts[2:] == repo_id.split("/")
            return self.send(200, json.dumps(self.listing(repo_id, folder, parts)).encode(), body, {})
        file = folder / "/".join(parts[4:])
        answered = (self.command, "/".join(parts[4:]), self.headers.get("Range"))
        self.server.served.append(answered)
        self.server.served_of[repo_id].append(answered)
        if not file.is_file():
            return self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.send_file(file, body)

    def listing(self, repo_id: str, folder: Path, parts: list[str]) -> object:
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if "tree" in parts:
            return [{"type": "file", "path": n, "size": f.stat().st_size, "oid": digest(f)} for n, f in files.items()]
        return {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "private": False}

    def send_file(self, file: Path, body: bool) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        part = content
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last) if last else len(content) - 1, len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            part = content[int(first) : end + 1]
        self.server.sent[file.name] += len(part) if body else 0
        return self.send(206 if asked else 200, part, body, headers)

    def send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def serving(repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[Hub]:
    """A hub for the length of a `with` block."""
    hub = Hub(repositories, gated)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
