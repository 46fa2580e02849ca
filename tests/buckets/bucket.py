"""A bucket in memory: a filesystem of fsspec for gs://, and a server of the JSON API, by which TensorStore reads it."""

import contextlib
import io
import json
import pickle
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.parse import parse_qs, quote, unquote, urlsplit
from urllib.request import ProxyHandler, build_opener

import fsspec
from fsspec import AbstractFileSystem

OBJECTS: dict[str, tuple[int, bytes]] = {}  # (generation, content) by bucket/name
LOCK = threading.Lock()


def names(begin: str) -> list[str]:
    """Names of the objects below the folder `begin`, relative to it."""
    return sorted(name.removeprefix(f"{begin}/") for name in OBJECTS if name.startswith(begin))


def put(name: str, content: bytes) -> int:
    with LOCK:
        generation = OBJECTS.get(name, (0, b""))[0] + 1
        OBJECTS[name] = generation, content
    return generation


class Upload(io.BytesIO):
    """An object that is there once it is closed."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def close(self) -> None:
        if not self.closed:
            put(self.name, self.getvalue())
        super().close()


class Bucket(AbstractFileSystem):
    """Folders are beginnings of names: they cannot be made, and are gone with their last object."""

    protocol = ("gs", "gcs")
    cachable = False

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        begin, found = f"{path}/" if path else "", {}
        for name, (generation, content) in list(OBJECTS.items()):
            if name == path or (name.startswith(begin) and "/" not in name[len(begin) :]):
                found[name] = {"name": name, "size": len(content), "type": "file", "generation": generation}
            elif name.startswith(begin):
                folder = begin + name[len(begin) :].partition("/")[0]
                found[folder] = {"name": folder, "size": 0, "type": "directory"}
        if not found:
            raise FileNotFoundError(path)
        return [found[name] for name in sorted(found)] if detail else sorted(found)

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            return Upload(path)
        try:
            return io.BytesIO(OBJECTS[path][1])
        except KeyError:
            raise FileNotFoundError(path) from None

    def _rm(self, path):
        OBJECTS.pop(path, None)

    def cp_file(self, path1, path2, **kwargs):
        if (held := OBJECTS.get(self._strip_protocol(path1))) is not None:  # no folder
            put(self._strip_protocol(path2), held[1])

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        if name is None:
            prefix = f"{bucket}/{query.get('prefix', '')}"
            items = [self._facts(key, *held) for key, held in sorted(OBJECTS.items()) if key.startswith(prefix)]
            return self._send(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
        if (held := OBJECTS.get(f"{bucket}/{name}")) is None:
            return self._send(404)
        generation, content = held
        if query.get("alt") != "media":
            return self._send(200, json.dumps(self._facts(f"{bucket}/{name}", *held)).encode())
        if not (asked := self.headers.get("Range")):
            return self._send(200, content, generation)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = (int(first), int(last) + 1 if last else len(content)) if first else (-int(last), len(content))
        begin = begin % len(content) if begin < 0 else begin
        part = content[begin:end]
        return self._send(206, part, generation, f"bytes {begin}-{begin + len(part) - 1}/{len(content)}")

    def do_POST(self) -> None:
        bucket, _, query = self._asked()
        content, key = self.rfile.read(int(self.headers["Content-Length"])), f"{bucket}/{query['name']}"
        expected = query.get("ifGenerationMatch")
        if expected is not None and int(expected) != OBJECTS.get(key, (0, b""))[0]:
            return self._send(412)
        put(key, content)
        return self._send(200, json.dumps(self._facts(key, *OBJECTS[key])).encode())

    def do_DELETE(self) -> None:
        bucket, name, _ = self._asked()
        self._send(404 if OBJECTS.pop(f"{bucket}/{name}", None) is None else 204)

    def _asked(self) -> tuple[str, str | None, dict[str, str]]:
        url = urlsplit(self.path)
        bucket, _, name = url.path.partition("/storage/v1/b/")[2].partition("/o")
        return bucket, unquote(name[1:]) or None, {key: values[0] for key, values in parse_qs(url.query).items()}

    def _facts(self, key: str, generation: int, content: bytes) -> dict[str, str]:
        updated = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(0))
        bucket, _, name = key.partition("/")
        facts = {"bucket": bucket, "name": name, "generation": str(generation), "metageneration": "1"}
        return facts | {"size": str(len(content)), "timeCreated": updated, "updated": updated}

    def _send(self, code: int, content: bytes = b"", generation: int = 0, span: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (("x-goog-generation", generation), ("Content-Range", span)):
            if value:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """The address of a server of the bucket."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def register(system: type[AbstractFileSystem] = Bucket) -> None:
    """Makes this bucket the one that fsspec and etils find behind gs://."""
    for scheme in ("gs", "gcs"):
        fsspec.register_implementation(scheme, system, clobber=True)


class Client(AbstractFileSystem):
    """The bucket as another process reads it, from the server at `address`."""

    protocol, cachable = Bucket.protocol, False
    address = ""

    def info(self, path, **kwargs):
        found = json.loads(self._get(path))
        return {"name": path, "size": int(found["size"]), "type": "file", "generation": found["generation"]}

    def _open(self, path, mode="rb", **kwargs):
        return io.BytesIO(self._get(path, "?alt=media"))

    def _get(self, path: str, query: str = "") -> bytes:
        bucket, _, name = self._strip_protocol(path).partition("/")
        url = f"{self.address}/storage/v1/b/{bucket}/o/{quote(name, safe='')}{query}"
        try:
            with build_opener(ProxyHandler({})).open(url) as answer:
                return answer.read()
        except HTTPError:
            raise FileNotFoundError(path) from None


class Elsewhere:
    """A source of records that other processes read by `Client`."""

    def __init__(self, source, address: str):
        self.source, self.address = source, address

    def __reduce__(self):
        return _arrive, (pickle.dumps(self.source), self.address)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int):
        return self.source[number]

    def __repr__(self) -> str:
        return repr(self.source)


def _arrive(source: bytes, address: str) -> Elsewhere:
    Client.address = address
    register(Client)  # before the source opens the bucket
    return Elsewhere(pickle.loads(source), address)
