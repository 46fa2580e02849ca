"""The whole pipelines against diffusers': a folder it saved, its noise recorded, three chunks."""

import os

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

from diffusers.pipelines.helios import pipeline_helios, pipeline_helios_pyramid  # noqa: E402

from helios_jax import HeliosPipeline  # noqa: E402
from tests.parity import pipelines  # noqa: E402
from tests.parity.pipelines import PROMPTS, Recorder  # noqa: E402
from tests.parity.reference import channels_last, check  # noqa: E402

SIZE = {"prompt": PROMPTS[0], "max_sequence_length": 24}

BASE = {
    "unipc, dynamic shift, guidance": (
        {"use_dynamic_shifting": True, "time_shift_type": "exponential"},
        {"guidance_scale": 5.0, "num_inference_steps": 6, "negative_prompt": "blurred", "height": 32, "width": 48},
    ),
    "unipc bh1, linear shift, two prompts, other memory": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "solver_type": "bh1"},
        {
            "prompt": PROMPTS,
            "guidance_scale": 2.0,
            "num_inference_steps": 3,
            "history_sizes": [8, 4, 2],
            "num_latent_frames_per_chunk": 5,
            "height": 48,
            "width": 16,
        },
    ),
    "euler, no guidance": (
        {"scheduler_type": "euler"},
        {
            "guidance_scale": 1.0,
            "num_inference_steps": 4,
            "max_sequence_length": 7,
            "num_latent_frames_per_chunk": 3,
            "height": 32,
            "width": 32,
        },
    ),
}

PYRAMID = {
    "Mid, unipc, CFG-Zero*": (
        {"use_dynamic_shifting": True},
        {"distilled": False, "zero_star": True},
        {"guidance_scale": 5.0, "pyramid_num_inference_steps_list": [3, 2, 4], "negative_prompt": "blurred"},
    ),
    "Mid, euler, plain guidance, two prompts": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "scheduler_type": "euler"},
        {"distilled": False, "zero_star": False},
        {"guidance_scale": 2.0, "pyramid_num_inference_steps_list": [1, 3, 2], "prompt": PROMPTS},
    ),
    "Mid, no zero init, unshifted": (
        {},
        {"distilled": False, "zero_star": True},
        {"guidance_scale": 3.0, "pyramid_num_inference_steps_list": [2, 1, 1], "use_zero_init": False},
    ),
    "Distilled, 2+2+2, twice for the first chunk": (
        {"use_dynamic_shifting": True},
        {"distilled": True, "zero_star": False},
        {"guidance_scale": 1.0, "pyramid_num_inference_steps_list": [2, 2, 2], "is_amplify_first_chunk": True},
    ),
    "Distilled, 1+1+1": (
        {"use_dynamic_shifting": True, "time_shift_type": "exponential"},
        {"distilled": True, "zero_star": True},
        {"guidance_scale": 1.0, "pyramid_num_inference_steps_list": [1, 1, 1]},
    ),
}


def compare(what, reference, module, options, tmp_path, monkeypatch, seed):
    """Latents and frames of three chunks, and the order of the draws."""
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    reference.set_progress_bar_config(disable=True)
    options = {**SIZE, **options}
    frames = 3 * (4 * (options.get("num_latent_frames_per_chunk", 9) - 1) + 1)

    noise = Recorder(monkeypatch, module, reference, seed)
    latents = pipelines.decoded_latents(monkeypatch, reference)
    generator = torch.Generator().manual_seed(seed)
    expected = reference(**options, num_frames=frames, output_type="np", generator=generator).frames
    drawn = list(noise.drawn)

    ours = HeliosPipeline.from_pretrained(tmp_path)
    got = ours(**options, num_frames=frames, output_type="latent", noise=noise).frames
    check(f"{what}, latents of three chunks", got, channels_last(torch.cat(latents, 2)), 1e-4, f"seed {seed}")
    noise.drawn = drawn
    video = ours(**options, num_frames=frames, noise=noise).frames
    assert video.shape[1] == frames  # the reference drops some
    check(f"{what}, frames of three chunks", video[:, : expected.shape[1]], expected, 1e-3, f"seed {seed}")
    return noise.sites


def fresh_seed() -> int:
    """Anew by each run, but fixed in CI, as hypothesis' draws are."""
    if os.environ.get("CI"):
        return 0
    return int(np.random.default_rng().integers(2**31))


@pytest.mark.parametrize("name", BASE)
def test_base(name, tmp_path, monkeypatch):
    scheduler, options = BASE[name]
    seed = fresh_seed()
    reference = pipelines.base(seed, scheduler, amplify=name.startswith("euler"))
    sites = compare("Base pipeline", reference, pipeline_helios, options, tmp_path, monkeypatch, seed)
    assert sites == ["latents"] * 6


# Tasks below have two steps of a level, and twice as many for the first chunk.
TWICE = "Distilled, 2+2+2, twice for the first chunk"


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.heavy) if x == TWICE else x for x in PYRAMID])
def test_pyramid(name, tmp_path, monkeypatch):
    scheduler, kind, options = PYRAMID[name]
    seed = fresh_seed()
    reference = pipelines.pyramid(seed, scheduler, **kind)
    what = "Distilled pipeline" if kind["distilled"] else "Mid pipeline"
    options = {"height": 64, "width": 128, "num_latent_frames_per_chunk": 3, **options}
    sites = compare(what, reference, pipeline_helios_pyramid, options, tmp_path, monkeypatch, seed)
    assert sites == ["latents", "block_noise", "block_noise"] * 6


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


TASKS = {
    "image": lambda rng: {"image": picture(rng, 90, 50)},
    "image, one for each of two prompts, second anchor": lambda rng: {
        "prompt": PROMPTS,
        "image": [picture(rng, 33, 70), picture(rng, 64, 64)],
        "image_noise_sigma_min": 0.3,
        "image_noise_sigma_max": 0.5,
        "video_noise_sigma_max": 0.9,
        "is_skip_first_chunk": True,
    },
    "video with a remainder": lambda rng: {"video": [picture(rng, 61, 47) for _ in range(22)]},
    "video longer than the memory, no noise, second anchor": lambda rng: {
        "video": [picture(rng, 40, 40) for _ in range(36)],
        "add_noise_to_video_latents": False,
        "history_sizes": [4, 2, 1],
        "is_skip_first_chunk": True,
    },
}


OF_BASE = ("image", "video longer than the memory, no noise, second anchor")


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        *(("Base", task) for task in OF_BASE),
        *(("Distilled", task) for task in TASKS if task not in OF_BASE),
        ("Mid", "video with a remainder"),
        # Which task it is and which kind of model do not meet in the code: all pairs are for `make test-all`.
        *(pytest.param("Base", task, marks=pytest.mark.heavy) for task in TASKS if task not in OF_BASE),
        *(pytest.param("Distilled", task, marks=pytest.mark.heavy) for task in OF_BASE),
    ],
)
def test_image_and_video(kind, task, tmp_path, monkeypatch):
    seed = fresh_seed()
    inputs = TASKS[task](np.random.default_rng(seed))
    size = {"height": 64, "width": 128 if kind == "Mid" else 64, "num_latent_frames_per_chunk": 3}
    if kind == "Base":
        reference, module = pipelines.base(seed, {"use_dynamic_shifting": True}), pipeline_helios
        options = {"guidance_scale": 3.0, "num_inference_steps": 2}
    else:
        distilled = kind == "Distilled"
        reference = pipelines.pyramid(seed, {"use_dynamic_shifting": True}, distilled=distilled, zero_star=True)
        module = pipeline_helios_pyramid
        options = {"guidance_scale": 1.0 if distilled else 3.0, "pyramid_num_inference_steps_list": [1, 2, 1]}
        options |= {"is_amplify_first_chunk": True} if distilled else {}
    what = f"{kind} pipeline, {'image' if 'image' in inputs else 'video'} to video"
    compare(what, reference, module, {**size, **options, **inputs}, tmp_path, monkeypatch, seed)
