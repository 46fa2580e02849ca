"""Networks of the metrics, tiny and random, as files in the layout that `--weights` takes."""

import gzip
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from helios_jax.heliosbench import clip_text, model_files

WIDTH, LAYERS, PATCH, GRID, OUT = 128, 2, 4, 3, 24
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o</w>"), ("w", "o"))
RNG = np.random.default_rng(0)


def random(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.normal(size=shape, scale=0.08).astype(np.float32)


def layers(prefix: str) -> dict[str, np.ndarray]:
    w = WIDTH
    shapes = {
        "ln_1.weight": (w,), "ln_1.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,),
        "attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,),
        "attn.out_proj.weight": (w, w), "attn.out_proj.bias": (w,),
        "mlp.c_fc.weight": (4 * w, w), "mlp.c_fc.bias": (4 * w,),
        "mlp.c_proj.weight": (w, 4 * w), "mlp.c_proj.bias": (w,),
    }  # fmt: skip
    blocks = [f"{prefix}transformer.resblocks.{i}." for i in range(LAYERS)]
    return {block + name: random(shape) for block in blocks for name, shape in shapes.items()}


def pictures(prefix: str, video: bool = False) -> dict[str, np.ndarray]:
    shapes = {
        "conv1.weight": (WIDTH, 3, *((1,) if video else ()), PATCH, PATCH), "class_embedding": (WIDTH,),
        "positional_embedding": (GRID**2 + 1, WIDTH), "proj": (WIDTH, OUT),
        "ln_pre.weight": (WIDTH,), "ln_pre.bias": (WIDTH,), "ln_post.weight": (WIDTH,), "ln_post.bias": (WIDTH,),
    } | ({"temporal_positional_embedding": (1, 8, WIDTH)} if video else {})  # fmt: skip
    return {prefix + name: random(shape) for name, shape in shapes.items()} | layers(prefix)


def texts(prefix: str, words: int) -> dict[str, np.ndarray]:
    shapes = {
        "token_embedding.weight": (words, WIDTH), "positional_embedding": (32, WIDTH), "text_projection": (WIDTH, OUT),
        "ln_final.weight": (WIDTH,), "ln_final.bias": (WIDTH,),
    }  # fmt: skip
    return {prefix + name: random(shape) for name, shape in shapes.items()} | layers(prefix)


def vocabulary(path: Path, monkeypatch) -> Path:
    """A file of few merges, for a `clip_text` that expects as many."""
    monkeypatch.setattr(clip_text, "MERGES", len(MERGES))
    path.write_bytes(gzip.compress("\n".join(["#version", *map(" ".join, MERGES), ""]).encode()))
    return path


def mean_onnx(path: Path) -> Path:
    """A network that gives the mean of two pictures, as ONNX's protobuf messages, field by field."""

    def message(field: int, content: bytes | str | int) -> bytes:
        if isinstance(content, int):
            return bytes([field << 3, content])
        content = content.encode() if isinstance(content, str) else content
        size = len(content)
        return bytes([field << 3 | 2, *([size] if size < 128 else [size & 127 | 128, size >> 7])]) + content

    def value(name: str) -> bytes:
        shape = b"".join(message(1, message(2, f"d{i}")) for i in range(4))
        return message(1, name) + message(2, message(1, message(1, 1) + message(2, shape)))

    node = b"".join([message(1, "a"), message(1, "b"), message(2, "y"), message(4, "Mean")])
    values = message(11, value("a")) + message(11, value("b")) + message(12, value("y"))
    graph = message(1, node) + message(2, "g") + values
    path.write_bytes(message(1, 8) + message(7, graph) + message(8, message(2, 17)))
    return path


def write_all(folder: Path, monkeypatch) -> Path:
    """All networks in a folder; AMT's is the mean of both pictures."""
    for name in ("aesthetic_model", "ViCLIP", "amt_model"):
        (folder / name).mkdir(parents=True)
    save_file(pictures("visual."), folder / f"{model_files.CLIP}.safetensors")
    head = {"weight": 30 * random((1, OUT)), "bias": np.full(1, 5, np.float32)}
    save_file(head, folder / f"{model_files.HEAD}.safetensors")
    both = pictures("vision_encoder.", video=True) | texts("text_encoder.", 2 * 256 + len(MERGES) + 2)
    save_file(both, folder / f"{model_files.VICLIP}.safetensors")
    vocabulary(folder / model_files.VOCABULARY, monkeypatch)
    mean_onnx(folder / f"{model_files.AMT}.onnx")
    return folder
