"""A server on this machine that gives folders as repositories of the hub, for processes whose environment it makes."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelInfo

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(repositories: Mapping[str, Path], cache: Path) -> Iterator[dict[str, str]]:
    """Yields the environment of a process to which `repositories`, folders by name, are the hub."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            code, headers, body = _answer(repositories, unquote(urlsplit(self.path).path))
            self.send_response(code)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
        finally:
            server.shutdown()


def info(name: str, files: Iterable[str], **_) -> ModelInfo:
    """The hub's answer to a question for a repository with these files."""
    return ModelInfo(id=name, siblings=[{"rfilename": file} for file in files])


def _answer(repositories: Mapping[str, Path], path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request for `path`."""
    for name, folder in repositories.items():
        files = sorted(each for each in folder.rglob("*") if each.is_file())
        if path.startswith(f"/api/models/{name}/tree/"):
            listed = [{"type": "file", "path": _name(file, folder), "size": 1, "oid": "0"} for file in files]
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        if path.startswith(f"/api/models/{name}"):
            siblings = [{"rfilename": _name(file, folder)} for file in files]
            facts = {"id": name, "sha": COMMIT, "private": False, "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()
        begin = f"/{name}/resolve/"
        if path.startswith(begin):
            _, _, inside = path.removeprefix(begin).partition("/")
            if (file := folder / inside).is_file():
                body = file.read_bytes()
                return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
    return 404, {"X-Error-Code": "RepoNotFound"}, b""


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()
