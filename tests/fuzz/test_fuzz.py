"""1,000 odd inputs: each is read rightly, or refused in one line. `make fuzz` runs them and writes what came out."""

import csv
import dataclasses
import io
import json
import os
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from helios_jax import lora
from helios_jax.media.image import read_image
from helios_jax.media.video import read_video
from helios_jax.models.transformer import Transformer
from helios_jax.sampling import cli
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.jobs import make_jobs
from helios_jax.sampling.options import SampleConfig
from helios_jax.training.stage_table import load_config, make_stage
from tests import tiny
from tests.fuzz.attempt import call, command, judge
from tests.fuzz.inputs import ODD_TEXT, changed, damage, damaged_tensors, lora_tensors, text

ROOT = Path(__file__).parents[2]
SMALL = {
    "prompt": "a red plus", "height": 32, "width": 48, "num_inference_steps": 2, "num_latent_frames_per_chunk": 3,
    "num_frames": 9, "out": "x.npz",
}  # fmt: skip
FIELDS = {f.name: f for f in dataclasses.fields(SampleConfig)}
# What would make more than a fuzzed input is worth: videos without end or of hours, and hubs.
LONG = ("num_frames", "num_inference_steps", "num_latent_frames_per_chunk", "height", "width", "history_sizes")
NAMES = [name for name in FIELDS if name not in ("switches", "loras", "model", *LONG)]


RIGHT = {
    "prompt": ["a bar", "a ${blue} bar", "'", "a, b", "1", "null"],
    "negative_prompt": ["", "a bar", "[]"],
    "seed": ["0", "18446744073709551615"],
    "fps": ["1", "24", "120"],
    "guidance_scale": ["1", "0", "-1", "7.5", "1e30"],
    "image": ["i.png"],
    "video": ["v.mp4"],
    "video_fps": ["8", "0.5", "1000"],
    "zero_steps": ["0", "9"],
    "interpolation_steps": ["0", "100"],
    "max_sequence_length": ["1", "16", "512"],
    "out": ["x.mp4", "x", "new/x.npz"],
    "state": ["s"],
    "overwrite": [""],
    "num_videos_per_prompt": ["1", "2"],
    "transformer": ["transformer"],
    "precision": ["float32", "bfloat16"],
    "attention": ["xla"],
    "norms": ["xla"],
    "image_noise_sigma_min": ["0", "0.1"],
    "image_noise_sigma_max": ["1", "0.2"],
    "add_noise_to_image_latents": ["true", "false"],
    "is_skip_first_chunk": ["true"],
    "use_zero_init": ["false"],
    "offload_text_encoder": ["true", "false"],
}


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples * int(os.environ.get("FUZZ_TIMES", "1")),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a failure is counted, and the next input tried
    )


def write_config(room: Path, assets: Path, **changes: Any) -> None:
    room.joinpath("c.yaml").write_text(yaml.safe_dump(SMALL | {"model": str(assets / "model")} | changes))


def made(room: Path) -> str:
    """Says what is wrong with the files of a run that said that it made its video; empty if nothing is."""
    for path in room.rglob("*.json"):
        try:
            facts = json.loads(path.read_text())
        except ValueError:
            continue
        if not isinstance(facts, dict) or "complete" not in facts:
            continue
        if facts["complete"] is not True:
            return f"{path} says that the video is not whole"
        out = next(p for p in (path.with_suffix(".npz"), path.with_suffix(".mp4"), path.with_suffix("")) if p.exists())
        if out.suffix == ".npz":
            latents = np.load(out)["latents"]
            if len(latents) != facts["frames"] or not np.isfinite(latents).all():
                return f"{out} has {len(latents)} frames of {facts['frames']}, or numbers that are not finite"
        elif out.suffix == ".mp4" and len(read_video(out)[0]) != facts["frames"]:
            return f"{out} has other frames than {facts['frames']}"
    return ""


@fuzz(200)
@given(data=st.data())
def test_flags(assets, rooms, data):
    room = rooms.new()
    write_config(room, assets)
    for name in ("i.png", "v.mp4"):
        (room / name).symlink_to(assets / name)
    names = data.draw(st.lists(st.sampled_from([*NAMES, *RIGHT]), min_size=1, max_size=3, unique=True))
    argv = ["c.yaml"]
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        right = name in RIGHT and data.draw(st.integers(0, 5)) > 0
        given_text = data.draw(st.sampled_from(RIGHT[name]) if right else text)
        form = data.draw(st.integers(0, 2))
        if name == "overwrite":
            argv += [flag]
        else:
            argv += [[flag, given_text], [f"{flag}={given_text}"], [f"{name}={given_text}"]][form]
    if data.draw(st.integers(0, 8)) == 0:
        argv += ["--then", data.draw(text), data.draw(text)]
    if data.draw(st.integers(0, 8)) == 0:
        argv += ["--lora", data.draw(text)]
    assume(not any(word in argv for word in ("-h", "--help")))
    outcome = command(cli.main, argv)
    judge("flags", outcome, argv, made(room) if outcome.code == 0 else "")


@fuzz(150)
@given(data=st.data())
def test_yaml(assets, rooms, data):
    room = rooms.new()
    write_config(room, assets)
    tree = SMALL | {"model": str(assets / "model"), "seed": 3, "loras": [], "switches": [{"prompt": "b", "chunk": 1}]}
    for name in LONG:
        tree.pop(name, None)
    tree = data.draw(changed(tree))
    if isinstance(tree, dict):
        tree = {"num_frames": 18, **{name: SMALL[name] for name in LONG if name in SMALL}, **tree}
    written = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    room.joinpath("c.yaml").write_bytes(data.draw(damage(written, most=2)))
    outcome = command(cli.main, ["c.yaml", "num_frames=18", "--num-inference-steps", "2"])
    judge("YAML", outcome, room.joinpath("c.yaml").read_bytes(), made(room) if outcome.code == 0 else "")


PROMPT = st.one_of(st.sampled_from([x for x in ODD_TEXT if x.strip()]), st.text(min_size=1, max_size=30))


@fuzz(150)
@given(data=st.data())
def test_csv(assets, rooms, data):
    """A table that no byte of was changed is either read as it was written or refused."""
    room = rooms.new()
    count = data.draw(st.integers(1, 4))
    more = st.sampled_from(["id", "seed", "negative_prompt", "num_frames"])
    columns = data.draw(st.permutations(["prompt", *data.draw(st.lists(more, unique=True))]))
    rows = []
    for i in range(count):
        row = {"prompt": data.draw(PROMPT), "id": str(i), "seed": str(i), "negative_prompt": data.draw(text)}
        rows.append(row | {"num_frames": "18"} | ({"seed": data.draw(text)} if data.draw(st.booleans()) else {}))
    dialect = data.draw(st.sampled_from([",", ",", ";", "\t"])), data.draw(st.sampled_from(["\n", "\r\n"]))
    quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    file = io.StringIO()
    writer = csv.DictWriter(
        file, columns, extrasaction="ignore", delimiter=dialect[0], lineterminator=dialect[1], quoting=quoting
    )
    writer.writeheader()
    writer.writerows(rows)
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    written = file.getvalue().encode(encoding, "surrogatepass")
    damaged = data.draw(damage(written, most=2)) if data.draw(st.booleans()) else written
    room.joinpath("p.csv").write_bytes(damaged)
    outcome, jobs = call(lambda: make_jobs(SampleConfig(**SMALL | {"csv": "p.csv", "out": "all"}), ChunkFrames(9, 9)))
    wrong = ""
    if outcome.code == 0 and damaged == written:
        got = [job.config.prompt.strip() for job in jobs]
        expected = [row["prompt"].strip() for row in rows]
        wrong = "" if got == expected else f"prompts {got}, not {expected}"
    judge("CSV", outcome, damaged, wrong)


MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F", "YCbCr"]


@fuzz(100)
@given(data=st.data())
def test_images(rooms, data):
    room = rooms.new()
    mode = data.draw(st.sampled_from(MODES))
    kind = data.draw(st.sampled_from(["png", "jpeg", "webp", "gif", "tiff", "bmp"]))
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    picture = Image.new("RGB", size, data.draw(st.tuples(*[st.integers(0, 255)] * 3)))
    file = io.BytesIO()
    try:
        picture.convert("I" if mode == "I;16" else mode).convert(mode).save(file, kind)
    except (OSError, ValueError):
        assume(False)
    room.joinpath("i").write_bytes(data.draw(damage(file.getvalue())))
    outcome, image = call(lambda: read_image(room / "i"))
    wrong = ""
    if outcome.code == 0 and (np.asarray(image).ndim != 3 or np.asarray(image).shape[2] != 3):
        wrong = f"shape {np.asarray(image).shape}"
    judge("images", outcome, (mode, kind, size), wrong)


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Small videos of several codecs and containers, and their frames."""
    folder, found = tmp_path_factory.mktemp("videos"), []
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (12, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    for name, codec, pixels in (
        ("a.mp4", "libx264", "yuv420p"),
        ("b.mkv", "ffv1", "yuv444p"),
        ("c.webm", "libvpx-vp9", "yuv420p"),
        ("d.avi", "mjpeg", "yuvj420p"),
        ("e.mov", "mpeg4", "yuv420p"),
    ):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=12)
            stream.width = stream.height = 32
            stream.pix_fmt = pixels
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        found.append((name, (folder / name).read_bytes()))
    return found


@fuzz(100)
@given(data=st.data())
def test_videos(rooms, videos, data):
    room = rooms.new()
    name, whole = data.draw(st.sampled_from(videos))
    damaged = data.draw(damage(whole))
    room.joinpath(name).write_bytes(damaged)
    rate = data.draw(st.sampled_from([None, None, 6, 24]))
    outcome, got = call(lambda: read_video(room / name, rate))
    wrong = ""
    if outcome.code == 0 and damaged == whole and len(got[0]) not in (6, 12, 24):
        wrong = f"{len(got[0])} frames"
    judge("videos", outcome, name, wrong)


@fuzz(100)
@given(data=st.data())
def test_checkpoints(assets, rooms, data):
    room = rooms.new()
    shutil.copytree(assets / "model", "model")
    path = data.draw(st.sampled_from(sorted(p for p in Path("model").rglob("*") if p.is_file())))
    how = data.draw(st.integers(0, 5))
    if path.suffix == ".json" and how < 4:
        tree = data.draw(changed(json.loads(path.read_text())))
        path.write_text(json.dumps(tree))
    elif path.suffix == ".safetensors" and how < 4:
        path.write_bytes(data.draw(damaged_tensors(path.read_bytes())))
    elif how == 4:
        path.unlink()
    else:
        path.write_bytes(data.draw(damage(path.read_bytes())))
    changed_to = path.read_bytes()[:3000] if path.exists() else None
    write_config(room, assets, model="model")
    outcome = command(cli.main, ["c.yaml"])
    judge("checkpoints", outcome, (path, changed_to), made(room) if outcome.code == 0 else "")


@pytest.fixture(scope="session")
def model():
    return tiny.pipeline().transformer


@fuzz(100)
@given(data=st.data())
def test_loras(model, rooms, data):
    room = rooms.new()
    tensors = data.draw(lora_tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = save(tensors)
    whole = data.draw(st.integers(0, 7)) > 0
    room.joinpath("l.safetensors").write_bytes(written if whole else data.draw(damage(written)))

    def use() -> Transformer:
        file = lora.read("l.safetensors")
        lora.check(model, {"0": file})
        return lora.merge(lora.attach(model, {"0": file}, {"0": 1.0}))

    outcome, merged = call(use)
    bad = outcome.code == 0 and not all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(merged))
    shown = {name: (x.shape, x.dtype, x.reshape(-1)[:1]) for name, x in tensors.items()}
    judge("LoRAs", outcome, shown, "not finite" if bad else "")


@pytest.fixture(scope="session")
def state(assets):
    """The bytes of a state after two chunks."""
    arguments = ["c.yaml", "--out", str(assets / "s.npz"), "--state", str(assets / "s"), "--num-frames", "18"]
    here = Path.cwd()
    try:
        os.chdir(assets)
        write_config(assets, assets)
        assert command(cli.main, arguments).code == 0
    finally:
        os.chdir(here)
    return (assets / "s").read_bytes()


@fuzz(100)
@given(data=st.data())
def test_states(assets, rooms, state, data):
    room = rooms.new()
    write_config(room, assets)
    (length,) = struct.unpack("<Q", state[:8])
    header, body = json.loads(state[8 : 8 + length]), state[8 + length :]
    if data.draw(st.integers(0, 3)):
        meta = data.draw(changed(json.loads(header["__metadata__"]["state"])))
        header["__metadata__"]["state"] = json.dumps(meta)
        told = json.dumps(header).encode()
        written = struct.pack("<Q", len(told)) + told + body
    else:
        written, meta = data.draw(damage(state)), "bytes"
    room.joinpath("s").write_bytes(written)
    outcome = command(cli.main, ["c.yaml", "--resume", "s", "--num-frames", "27"])
    judge("states", outcome, meta, made(room) if outcome.code == 0 else "")


STAGES = sorted(path for path in (ROOT / "configs").glob("stage*_*.yaml"))


@fuzz(100)
@given(data=st.data())
def test_training_configs(rooms, data):
    room = rooms.new()
    base = yaml.safe_load(data.draw(st.sampled_from(STAGES)).read_text())
    base.pop("base", None)
    tree = {"base": str(ROOT / "configs" / "stages.yaml")} | base
    tree = data.draw(changed(tree))
    room.joinpath("c.yaml").write_bytes(data.draw(damage(yaml.safe_dump(tree).encode(), most=1)))
    key = data.draw(st.sampled_from(["optim.lr", "steps", "data.batch_size", "mesh.fsdp", "seed", "x"]))
    overrides = [f"{key}={data.draw(text)}"] if data.draw(st.booleans()) else []
    outcome, _ = call(lambda: make_stage(load_config("c.yaml", overrides)))
    judge("training configs", outcome, (tree, overrides))
