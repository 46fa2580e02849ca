"""A video that goes on from its state, in the same file, and what else the command line may not ask for then."""

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import sample
from helios_jax import HeliosPipeline
from helios_jax.media.video import read_video
from helios_jax.sampling import one_video, outputs
from helios_jax.sampling.fingerprint import content_hash
from helios_jax.sampling.stream_state import read_state
from tests.tiny_run import CONFIG


@pytest.fixture
def run(tmp_path, folder, monkeypatch):
    """sample.py in an empty folder; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"{CONFIG}model: {folder}\nout: out.npz\n")
    return lambda *arguments: sample.main(["c.yaml", *map(str, arguments)])


def refusal(capsys, code, *words):
    """Checks that the last run ended in one line with the `words`."""
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert all(word in error for word in words), error


def with_other_weights(folder, copy):
    """A copy of a checkpoint whose transformer differs in one number."""
    shutil.copytree(folder, copy)
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    tensors[first] = tensors[first] + np.eye(1, tensors[first].size, dtype=np.float32).reshape(tensors[first].shape)
    save_file(tensors, path)


def frames_of(out):
    path = Path(out)
    if path.suffix == ".mp4":
        return read_video(path)[0].astype(int)
    if path.suffix == ".npz":
        return np.load(path)["latents"]
    return np.stack([np.asarray(Image.open(frame)) for frame in sorted(path.glob("*.png"))])


def check_frames(frames, expected):
    """Checks that each frame is that of its place: an encoder that begins anew changes their values a little."""
    assert len(frames) == len(expected)
    for i, frame in enumerate(frames):
        assert np.argmin(np.abs(expected - frame).mean(tuple(range(1, frame.ndim + 1)))) == i


def as_killed(out):
    """Leaves the file as a process does that is killed after it saved its state: mp4s then lack their last frame."""
    path = Path(out)
    if path.suffix == ".mp4":
        data = path.read_bytes()
        path.write_bytes(data[: data.rfind(b"moof") - 4])
    elif path.suffix == "":
        max(path.glob("*.png")).unlink()
    facts = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(
        json.dumps({k: facts[k] for k in ("settings", "inputs")} | {"complete": False})
    )


@pytest.mark.parametrize("out", ["x.mp4", "x.npz", "x"])
def test_a_file_goes_on_where_its_state_is(run, out, capsys):
    whole = "whole" + Path(out).suffix
    assert run("--num-frames", 40, "--seed", 2, "--out", whole) == 0
    assert run("--num-frames", 18, "--seed", 2, "--out", out, "--state", "s") == 0
    as_killed(out)
    before = frames_of(out)
    assert run("--num-frames", 40, "--resume", "s", "--out", out, "--state", "s") == 0
    after, expected = frames_of(out), frames_of(whole)
    np.testing.assert_array_equal(after[: len(before)], before)
    assert after.shape == expected.shape
    check_frames(after, expected)
    if out != "x.mp4":
        np.testing.assert_array_equal(after, expected)
    facts = json.loads(Path("x.json").read_text())
    assert (facts["complete"], facts["first_chunk"], facts["chunks"], facts["frames"]) == (True, 0, 5, len(expected))
    assert facts["settings"]["seed"] == 2
    capsys.readouterr()
    files = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert run("--num-frames", 40, "--resume", "s", "--out", out) == 0
    assert "nothing left to make" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == files


def test_a_finished_video_gets_the_frame_that_a_kill_took(run):
    """Also where `num_frames` cut the last chunk."""
    assert run("--num-frames", 16, "--out", "x.mp4", "--state", "s") == 0
    expected = frames_of("x.mp4")
    as_killed("x.mp4")
    assert len(frames_of("x.mp4")) == 15
    assert run("--resume", "s", "--out", "x.mp4") == 0
    assert len(frames_of("x.mp4")) == 16
    check_frames(frames_of("x.mp4"), expected)
    assert run("--resume", "s", "--out", "x.mp4", "--num-frames", 20, "--state", "s") == 0
    assert len(frames_of("x.mp4")) == 20


def test_less_than_is_there_is_nothing_left_to_make(run, capsys):
    """The file is not cut, and its facts stay."""
    assert run("--num-frames", 27, "--out", "x.mp4", "--state", "s") == 0
    as_killed("x.mp4")
    before = Path("x.mp4").read_bytes(), Path("x.json").read_text()
    for frames in (9, 26):
        assert run("--resume", "s", "--out", "x.mp4", "--num-frames", frames) == 0
        assert "nothing left to make" in capsys.readouterr().out
        assert (Path("x.mp4").read_bytes(), Path("x.json").read_text()) == before


def test_an_interrupt_before_the_next_chunk_counts_those_that_are_there(run, monkeypatch):
    assert run("--num-frames", 18, "--out", "x.mp4", "--state", "s") == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one_video, "_start", interrupted)
        assert run("--num-frames", 36, "--resume", "s", "--out", "x.mp4") == 130
    facts = json.loads(Path("x.json").read_text())
    assert (facts["complete"], facts["chunks"], facts["frames"]) == (False, 2, 18)
    assert run("--num-frames", 36, "--resume", "s", "--out", "x.mp4") == 0
    assert len(frames_of("x.mp4")) == 36


def test_the_rest_in_a_file_of_its_own_goes_on_too(run):
    assert run("--num-frames", 45, "--out", "whole.npz") == 0
    assert run("--num-frames", 18, "--state", "s", "--out", "a.npz") == 0
    assert run("--num-frames", 27, "--resume", "s", "--state", "s", "--out", "b.npz") == 0
    assert json.loads(Path("b.json").read_text())["first_chunk"] == 2
    assert run("--num-frames", 45, "--resume", "s", "--out", "b.npz") == 0
    joined = np.concatenate([frames_of("a.npz"), frames_of("b.npz")])
    np.testing.assert_array_equal(joined, frames_of("whole.npz"))


def test_what_the_command_line_leaves_out_is_as_in_the_state(run, capsys):
    first = ("--prompt", "a ${blue} bar", "--seed", 5, "--num-frames", 27, "--then", 1, "a bar", "guidance_scale=2")
    assert run(*first, "--out", "whole.npz") == 0
    assert run(*first, "--num-frames", 18, "--out", "a.npz", "--state", "s") == 0
    assert run("--resume", "s", "--num-frames", 27, "--out", "a.npz") == 0
    np.testing.assert_array_equal(frames_of("a.npz"), frames_of("whole.npz"))
    facts = json.loads(Path("a.json").read_text())
    assert facts["settings"] == json.loads(Path("whole.json").read_text())["settings"]
    assert run(*first, "--resume", "s", "--out", "b.npz") == 0  # the same command again says the same


@pytest.fixture
def begun(run, folder):
    """A video of two chunks with an image and a LoRA, and its state."""
    Image.new("RGB", (48, 32), "red").save("i.png")
    rng = np.random.default_rng(0)
    pair = {"lora_A.weight": (2, 32), "lora_B.weight": (32, 2)}
    for name in ("l.safetensors", "other.safetensors"):
        tensors = {f"transformer.blocks.0.attn1.to_q.{k}": rng.standard_normal(s, np.float32) for k, s in pair.items()}
        save_file(tensors, name)
    arguments = ("--num-frames", 18, "--image", "i.png", "--lora", "l.safetensors=0.5", "--then", 1, "a bar")
    assert run(*arguments, "--out", "x.npz", "--state", "s") == 0


CONTRADICTIONS = [
    (["--prompt", "a blue bar"], ["prompt", "'a blue bar'", "'a red plus'", "leave prompt out"]),
    (["seed=5"], ["seed", "5", "with 0"]),
    (["--negative-prompt", "x"], ["negative_prompt"]),
    (["--guidance-scale", "2"], ["guidance_scale"]),
    (["--height", "48"], ["height", "48", "with 32"]),
    (["--then", "1", "a plus"], ["'a plus' begins at chunk 1", "before chunk 2"]),
    (["--image", "other.png"], ["image", "made with other image"]),
    (["--lora", "other.safetensors=0.5"], ["loras", "other loras"]),
    (["--lora", "l.safetensors"], ["loras", "other loras"]),
    (["--model", "other"], ["weights", "other weights"]),
]


def test_contradictions_are_refused_before_weights_are_read(run, begun, folder, capsys, monkeypatch):
    Image.new("RGB", (48, 32), "blue").save("other.png")
    with_other_weights(folder, Path("other"))
    monkeypatch.setattr(one_video.HeliosPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    capsys.readouterr()
    for arguments, words in CONTRADICTIONS:
        refusal(capsys, run("--num-frames", 27, "--resume", "s", "--out", "x.npz", *arguments), *words)


def test_paths_may_be_others_where_the_content_is_the_same(run, begun, folder):
    for name in ("l.safetensors", "i.png"):
        Path(f"same-{name}").write_bytes(Path(name).read_bytes())
    again = ("--image", "same-i.png", "--lora", "same-l.safetensors=0.5", "--then", 2, "a plus")
    assert run("--num-frames", 27, "--resume", "s", "--out", "x.npz", *again) == 0
    assert len(frames_of("x.npz")) == 9


def test_the_machine_that_goes_on_chooses_its_kernels(run):
    assert run("--num-frames", 18, "--attention", "xla", "--norms", "xla", "--out", "x.npz", "--state", "s") == 0
    assert run("--num-frames", 27, "--resume", "s", "--out", "y.npz") == 0
    settings = json.loads(Path("y.json").read_text())["settings"]
    assert (settings["attention"], settings["norms"]) == (None, None)


def test_a_state_of_python_goes_on(run, folder, capsys):
    pipe = HeliosPipeline.from_pretrained(folder)
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "num_latent_frames_per_chunk": 3}
    stream = pipe.stream("a bar", seed=4, num_frames=27, output_type="latent", **options)
    chunks = [next(stream)]
    stream.save_state("s")
    chunks += list(stream)
    refusal(capsys, run("--resume", "s", "--seed", 1), "seed", "with 4")
    assert run("--resume", "s") == 0
    np.testing.assert_array_equal(frames_of("out.npz"), np.concatenate(chunks[1:], 1)[0])
    pair = pipe.stream(["a bar", "a plus"], num_frames=27, output_type="latent", **options)
    next(pair)
    pair.save_state("two")
    refusal(capsys, run("--resume", "two", "--out", "y.npz"), "is of 2 videos")


def test_other_files_do_not_go_on(run, capsys):
    assert run("--num-frames", 18, "--out", "x.mp4", "--state", "s") == 0
    assert run("--num-frames", 18, "--out", "y.mp4", "--seed", 1) == 0
    capsys.readouterr()
    rest = ("--resume", "s", "--num-frames", 27)
    refusal(capsys, run(*rest, "--out", "y.mp4"), "y.mp4", "not the file of the video")
    refusal(capsys, run(*rest, "--out", "x.mp4", "--fps", 12), "x.mp4", "is there already")
    data = Path("x.mp4").read_bytes()
    Path("x.mp4").write_bytes(data[:1500])
    refusal(capsys, run(*rest, "--out", "x.mp4"), "x.mp4 has 0 frames", "after 18")
    Path("x.mp4").write_bytes(b"other")
    refusal(capsys, run(*rest, "--out", "x.mp4"), "x.mp4", "does not read as video")
    assert Path("x.mp4").read_bytes() == b"other"
    Path("x.mp4").write_bytes(data)
    assert run(*rest, "--out", "x.mp4", "--num-frames", 36) == 0
    refusal(capsys, run(*rest, "--out", "x.mp4"), "has chunks 0 to 3", "before chunk 2")


def test_done_before_goes_by_content(run, folder, capsys):
    Image.new("RGB", (48, 32), "red").save("i.png")
    Path("p.csv").write_text("id,prompt,image\n1,a bar,i.png\n")
    Path("q.csv").write_text("id,prompt,image\n1,a bar,./same.png\n")
    Path("same.png").write_bytes(Path("i.png").read_bytes())
    arguments = ("--num-frames", 9, "--out", "all", "--csv")
    assert run(*arguments, "p.csv") == 0
    Path("link").symlink_to(folder)
    assert run(*arguments, "q.csv", "--model", "link") == 0
    assert "1 videos, 1 of them done before" in capsys.readouterr().out
    Image.new("RGB", (48, 32), "blue").save("same.png")
    content_hash.cache_clear()
    refusal(capsys, run(*arguments, "q.csv"), "all/1.mp4", "other settings (image)")
    with_other_weights(folder, Path("other"))
    refusal(capsys, run(*arguments, "p.csv", "--model", "other"), "other settings (weights)")
    Path("r.csv").write_text("id,prompt\n1,a bar\n")
    refusal(capsys, run(*arguments, "r.csv"), "other settings (image)")
    Path("i.png").unlink()  # a video that is made does not need its input
    assert run(*arguments, "p.csv") == 0


def test_two_runs_share_a_batch(run, capsys):
    """A video that another process makes is left to it, and one that it has made since this run began."""
    Path("p.txt").write_text("a bar\na plus\na square\n")
    Path("all").mkdir()
    with outputs.claim(Path("all/1.mp4")) as ours:
        assert ours
        with outputs.claim(Path("all/1.mp4")) as other:
            assert not other
        assert run("--csv", "p.txt", "--num-frames", 9, "--out", "all") == 0
    assert "1 of 3 videos are left to another run" in capsys.readouterr().out
    assert {path.name for path in Path("all").glob("*.mp4")} == {"0.mp4", "2.mp4"}
    assert not list(Path("all").glob(".*"))
    with outputs.claim(Path("x.mp4")):
        refusal(capsys, run("--out", "x.mp4", "--num-frames", 9), "x.mp4 is being made by another run")


def test_a_lock_that_goes_as_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    """The run that held it removes its file between our opening and locking it: nobody else would see our lock."""
    flock, calls = fcntl.flock, []

    def remove_first(*arguments):
        if not calls:
            (tmp_path / ".x.mp4.lock").unlink()
        calls.append(arguments)
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with outputs.claim(tmp_path / "x.mp4") as ours, outputs.claim(tmp_path / "x.mp4") as other:
        assert (ours, other) == (True, False)


def test_the_state_tells_what_made_it(run, begun):
    about = read_state("s").about
    assert about["settings"]["image"] == "i.png"
    assert set(about["inputs"]) == {"weights", "loras", "image"}
