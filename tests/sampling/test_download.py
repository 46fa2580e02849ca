"""Inputs by http: what is read, what the sidecar says, and that every failure is one line before weights are read."""

import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from helios_jax.media.mp4 import VideoWriter
from helios_jax.sampling import cli, download
from helios_jax.sampling.context import frames_of, prepare_images
from helios_jax.sampling.pipeline import HeliosPipeline
from tests import tiny

PIXELS = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)


def png() -> bytes:
    Image.fromarray(PIXELS).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "v.mp4"
    with VideoWriter(path, 10, 32, 48) as writer:
        writer.write(np.stack([PIXELS] * 12))
    return path.read_bytes()


@pytest.fixture
def address(clip, monkeypatch):
    """A server on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"/i.png": png(), "/a%20b.png": png(), "/v.mp4": clip, "/page": b"<html>"}.get(self.path, b"x" * 9)
            to = {"/moved": "/i.png", "/file": "file:///etc/hostname", "/ftp": "ftp://localhost/x", "/loop": "/loop"}
            self.send_response(404 if self.path == "/none" else 302 if self.path in to else 200)
            length = {"/large": 10**12, "/cut": 10**6}.get(self.path, len(body))
            if self.path != "/endless":
                self.send_header("Content-Length", str(length))
            if self.path in to:
                self.send_header("Location", to[self.path])
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body if self.path != "/endless" else b"x" * 10**7)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_and_a_video_by_their_addresses(address):
    for path in ("i.png", "moved", "a b.png"):
        (image,) = prepare_images(f"{address}/{path}", 1, 32, 48)
        np.testing.assert_allclose(image[0], PIXELS / 127.5 - 1, atol=1e-6)
    assert len(list(frames_of(f"{address}/v.mp4", None, "video"))) == 12


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/none", "cannot be downloaded (404 Not Found)"),
        ("/page", "is not a readable image"),
        ("/large", "larger than 100 MB"),
        ("/endless", "larger than 5 MB"),
        ("/cut", "cannot be downloaded (9 of 1000000 bytes came)"),
        ("/file", "cannot be downloaded (302"),
        ("/ftp", "cannot be downloaded (unknown url type: ftp)"),
        ("/loop", "cannot be downloaded (302"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(address, path, words, monkeypatch):
    if path == "/endless":
        monkeypatch.setitem(download.MOST_BYTES, "image", 5_000_000)
    with pytest.raises(ValueError) as e:
        prepare_images(f"{address}{path}", 1, 32, 48)
    line = str(e.value)
    assert line.startswith(f"{address}{path}: ")
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("http://127.0.0.1:1/x.png", "cannot be downloaded (Connection refused)"),
        ("http:///x.png", "cannot be downloaded (no host given)"),
        ("http://[::1/x.png", "cannot be downloaded ("),
        ("http://127.0.0.1:x/x.png", "cannot be downloaded ("),
        ("file:///etc/hostname", "file is not read"),
        ("ftp://localhost/x.png", "ftp is not read"),
        ("tcp://localhost:1/x", "tcp is not read"),
        ("concat:/etc/hostname", "no such file"),
    ],
)
def test_other_addresses_are_refused(name, words, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for read in (lambda: prepare_images(name, 1, 32, 48), lambda: list(frames_of(name, None, "video"))):
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            read()
        assert words in str(e.value)
        assert "\n" not in str(e.value)


def test_a_run_records_the_address_and_fails_before_weights(address, tmp_path, capsys, monkeypatch):
    folder = tiny.folder(tmp_path / "pipeline")
    (tmp_path / "c.yaml").write_text(
        f"model: {folder}\nprompt: a\nheight: 32\nwidth: 48\nnum_inference_steps: 2\nnum_latent_frames_per_chunk: 3\n"
        "num_frames: 9\n"
    )
    (tmp_path / "p.csv").write_text(f"prompt,image\na,{address}/i.png\nb,{address}/none\n")
    assert cli.main([str(tmp_path / "c.yaml"), "--csv", str(tmp_path / "p.csv"), "--out", str(tmp_path / "all")]) == 1
    assert f"id 1: {address}/none: cannot be downloaded (404 Not Found)" in capsys.readouterr().err
    assert json.loads((tmp_path / "all" / "0.json").read_text())["settings"]["image"] == f"{address}/i.png"
    monkeypatch.setattr(HeliosPipeline, "from_pretrained", None)
    assert cli.main([str(tmp_path / "c.yaml"), "--video", f"{address}/none", "--out", str(tmp_path / "y.mp4")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "downloading" not in line]
    assert len(lines) == 1
