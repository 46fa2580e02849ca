"""Strategies for odd values and damaged files."""

import json
import struct
from typing import Any

import numpy as np
from hypothesis import strategies as st

ODD_TEXT = [
    "", " ", "0", "-1", "1", "2", "3.5", "1e3", "1e400", "nan", "inf", "-inf", "null", "true", "false", "[]", "[1]",
    "[1,2,3]", "{}", "{a: 1}", "2147483647", "2147483648", "4294967301", "9223372036854775807", "18446744073709551615",
    "18446744073709551616", "9" * 40, "0x10", "1_000", "٣", "½", "a", "infs", "nans", "-5s", "1e400s",
    "a" * 300, "a" * 5000,
    "/", ".", "..", "~", "~nobody/x", "/dev/full", "/dev/null", "/proc/self/mem", "/etc/hostname/x", "no/such/file",
    "x.mp4", "x.npz", "x.gif", "x", "c.yaml", "file:x.mp4", "tcp://localhost:1/x", "take:1.mp4", "-", "--", "${seed}",
    "${oc.env:HOME}", "é", "\u202e", "🦊", "a\nb", "a\tb", "'", '"', "#", "%s", "%", "\\", "a=b", "=",
    "!!python/object:os.system",
]  # fmt: skip

text = st.one_of(st.sampled_from(ODD_TEXT), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), text, st.integers(min_value=-2, max_value=40), st.just(2**63)
)
value = st.recursive(
    scalar, lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(text, x, max_size=3)), max_leaves=5
)


@st.composite
def damage(draw: Any, data: bytes, most: int = 3) -> bytes:
    """`data` with up to `most` bytes or ranges changed, cut out, repeated, or its end cut off."""
    for _ in range(draw(st.integers(0, most))):
        place = int(draw(st.floats(0, 1)) * len(data))
        kind = draw(st.sampled_from(["set", "cut", "end", "insert", "repeat", "zero"]))
        length = draw(st.integers(1, 40))
        if kind == "set":
            data = data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place] + data[place + length :]
        elif kind == "end":
            data = data[:place]
        elif kind == "insert":
            data = data[:place] + draw(st.binary(max_size=20)) + data[place:]
        elif kind == "repeat":
            data = data[:place] + data[place : place + length] * 2 + data[place + length :]
        else:
            data = data[:place] + bytes(length) + data[place + length :]
    return data


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A JSON value with one place in it changed, taken out or added to."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(tree)))
        how = draw(st.integers(0, 9))
        if how == 0:
            return {k: v for k, v in tree.items() if k != key}
        if how == 1:
            return tree | {draw(text): draw(value)}
        return tree | {key: draw(changed(tree[key]))}
    if isinstance(tree, list) and tree and draw(st.integers(0, 2)):
        i = draw(st.integers(0, len(tree) - 1))
        return [*tree[:i], draw(changed(tree[i])), *tree[i + 1 :]]
    if isinstance(tree, int) and not isinstance(tree, bool) and draw(st.booleans()):
        return draw(st.sampled_from([0, -1, tree + 1, 2 * tree, tree * 10**6, float(tree), str(tree), 10**30]))
    return draw(value)


@st.composite
def damaged_tensors(draw: Any, data: bytes) -> bytes:
    """A safetensors file with a header that was changed, numbers that are no numbers, or bytes that are gone."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = draw(st.integers(0, 3))
    if how == 0:
        body = body[: int(draw(st.floats(0, 1)) * len(body))]
    elif how == 1:
        place = 4 * int(draw(st.floats(0, 1)) * (len(body) // 4))
        body = body[:place] + struct.pack("<f", draw(st.sampled_from([float("nan"), float("inf")]))) + body[place + 4 :]
    elif how == 2:
        header = draw(changed(header))
    else:
        return draw(damage(data))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


LAYERS = (
    *("blocks.0.attn1.to_q", "blocks.1.attn1.to_k", "blocks.0.attn2.to_v", "blocks.1.attn1.to_out.0"),
    "blocks.0.attn1.to_q",
    "blocks.1.ffn.net.0.proj",
    "blocks.0.self_attn.q",
    "blocks.0.nothing",
    "blocks.9.ffn",
)
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", "_orig_mod.", "", "unet.")
PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
)
KINDS = (*[np.float32] * 8, np.float16, np.int8, np.bool_, np.float64)


@st.composite
def lora_tensors(draw: Any) -> dict[str, np.ndarray]:
    """Tensors as LoRA files have them, some of other shapes and types than a model can use."""
    prefix, pair = draw(st.sampled_from(PREFIXES)), draw(st.sampled_from(PAIRS))
    tensors: dict[str, np.ndarray] = {}
    sizes = st.sampled_from([0, 1, 2, 4, 32, 48])
    for layer in draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=2, unique=True)):
        rank = draw(st.sampled_from([1, 2, 4, 1, 2, 4, 1, 2, 4, 0]))
        wide = 48 if "ffn" in layer else 32
        shapes = (rank, 32), (wide, rank)
        if draw(st.integers(0, 7)) == 0:
            shapes = (rank, draw(sizes)), (draw(sizes), draw(sizes))
        kind = draw(st.sampled_from(KINDS))
        for part, shape in zip(pair, shapes):
            number = draw(st.sampled_from([*[0.1] * 8, 0, np.nan, np.inf]))
            with np.errstate(all="ignore"):
                tensors[f"{prefix}{layer}.{part}"] = np.full(shape, number).astype(kind)
        if draw(st.integers(0, 2)) == 0:
            tensors[f"{prefix}{layer}.alpha"] = np.array(draw(st.floats(-1e6, 1e6, width=32)), np.float32)
        if draw(st.integers(0, 7)) == 0:
            part = draw(st.sampled_from(["diff", "diff_b", "diff_m", "dora_scale", "x"]))
            tensors[f"{prefix}{layer}.{part}"] = np.ones((32,), np.float32)
    return tensors
