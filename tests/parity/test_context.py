"""Image and video input: what diffusers' pipelines feed their transformer as history, and what we do."""

import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

import PIL.Image  # noqa: E402
from diffusers.pipelines.helios import pipeline_helios, pipeline_helios_pyramid  # noqa: E402
from diffusers.video_processor import VideoProcessor  # noqa: E402

from helios_jax.diffusion.memory import MemoryConfig, empty, push, window  # noqa: E402
from helios_jax.models.layers import Shapes  # noqa: E402
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig  # noqa: E402
from helios_jax.pretrained import from_arrays  # noqa: E402
from helios_jax.sampling import context  # noqa: E402
from helios_jax.sampling.context import ContextConfig  # noqa: E402
from tests.parity import pipelines  # noqa: E402
from tests.parity.pipelines import PROMPTS, Recorder  # noqa: E402
from tests.parity.reference import arrays, channels_last, check  # noqa: E402
from tests.parity.test_pipeline import fresh_seed  # noqa: E402
from tests.pixels import preprocess_image, preprocess_video  # noqa: E402

BAR = 1e-5
MEMORY = MemoryConfig(long=8, mid=2, recent=1, frames_per_chunk=3)  # chunks of 9 frames; 11 latents are 4 chunks
SIZES = [(53, 37), (17, 90)]  # of the inputs: one side or both become smaller, and larger
HEIGHT, WIDTH = 32, 48


def pictures(seed: int, count: int, size: int = 0) -> list[PIL.Image.Image]:
    rng = np.random.default_rng([seed, size])
    w, h = SIZES[size]
    return [PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for _ in range(count)]


def autoencoder(pipe) -> AutoencoderKLWan:
    config = VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in pipe.vae.config.items() if k[0] != "_"})
    return from_arrays(AutoencoderKLWan(config, rngs=Shapes()), arrays(pipe.vae))


class Reference:
    """A whole call of a pipeline whose transformer only notes what history it is given."""

    def __init__(self, monkeypatch, seed: int, *, pyramid: bool):
        scheduler = {"use_dynamic_shifting": True}
        module = pipeline_helios_pyramid if pyramid else pipeline_helios
        self.pipe = (
            pipelines.pyramid(seed, scheduler, distilled=True, zero_star=False)
            if pyramid
            else pipelines.base(seed, scheduler)
        )
        self.steps = {"pyramid_num_inference_steps_list": [1, 1, 1]} if pyramid else {"num_inference_steps": 1}
        self.draws_of_a_chunk = 3 if pyramid else 1
        self.size = (64, 128) if pyramid else (HEIGHT, WIDTH)
        self.pipe.set_progress_bar_config(disable=True)
        self.vae = autoencoder(self.pipe)
        self.noise = Recorder(monkeypatch, module, self.pipe, seed)
        self.generated = pipelines.decoded_latents(monkeypatch, self.pipe)
        self.seen: list[dict[str, np.ndarray]] = []

        def forward(hidden_states, latents_history_short, latents_history_mid, latents_history_long, **_):
            self.seen.append(
                {
                    "short": channels_last(latents_history_short),
                    "mid": channels_last(latents_history_mid),
                    "long": channels_last(latents_history_long),
                }
            )
            return (torch.zeros_like(hidden_states),)

        monkeypatch.setattr(self.pipe.transformer, "forward", forward)

    def __call__(self, prompts, memory=MEMORY, chunks=1, **options):
        """The history of every chunk's first step."""
        height, width = self.size
        self.pipe(
            prompts,
            height=height,
            width=width,
            num_frames=chunks * (4 * memory.frames_per_chunk - 3),
            guidance_scale=1.0,
            max_sequence_length=4,
            history_sizes=[memory.recent, memory.long, memory.mid],  # it sorts them
            num_latent_frames_per_chunk=memory.frames_per_chunk,
            is_skip_first_chunk=memory.anchor == "second",
            output_type="latent",
            **self.steps,
            **options,
        )
        return self.seen[:: len(self.seen) // chunks]


def compare(what: str, history, expected, seed: int, memory=MEMORY):
    parts, _ = window(memory, history)
    for name, value in expected.items():
        ours = getattr(parts, name)
        assert ours.shape == value.shape
        if np.any(value):
            check(f"history of {what}", ours, value, BAR, f"{name}, seed {seed}")
        else:
            np.testing.assert_array_equal(ours, value)


IMAGES = {
    "one": {},
    "two": {"batch": 2},
    "wide sigmas": {"config": ContextConfig(image_noise_sigma_min=0.0, video_noise_sigma_max=1.0)},
    "no noise": {"config": ContextConfig(add_noise_to_image_latents=False)},
    "in a pyramid": {"pyramid": True, "batch": 2},
}


@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_image(case, monkeypatch):
    seed, batch, config = fresh_seed(), case.get("batch", 1), case.get("config", ContextConfig())
    reference = Reference(monkeypatch, seed, pyramid=case.get("pyramid", False))
    images = [pictures(seed, 1, i)[0] for i in range(batch)]
    given = images[0] if batch == 1 else images
    (expected,) = reference(PROMPTS[:batch], image=given, **vars(config))
    pixels = context.prepare_images(given, batch, *reference.size)
    history = context.from_image(reference.vae, pixels, MEMORY, config, reference.noise)
    compare("an image", history, expected, seed)
    assert len(reference.noise.drawn) == reference.draws_of_a_chunk
    assert bool(history.anchored)
    assert int(history.chunk) == 0


def test_one_image_for_two_prompts(monkeypatch):
    seed = fresh_seed()
    reference = Reference(monkeypatch, seed, pyramid=False)
    (image,) = pictures(seed, 1)
    (expected,) = reference(PROMPTS, image=[image, image])  # diffusers wants it twice
    pixels = context.prepare_images(image, 2, *reference.size)
    assert pixels.shape == (1, 1, HEIGHT, WIDTH, 3)
    history = context.from_image(reference.vae, pixels, MEMORY, ContextConfig(), reference.noise, batch=2)
    compare("an image", history, expected, seed)


VIDEOS = {
    "a chunk": {"frames": 9},
    "shorter than the window, with a remainder": {"frames": 2 * 9 + 5},
    "as long as what reaches the window": {"frames": 4 * 9},
    "longer, with a remainder": {"frames": 6 * 9 + 4},
    "two, no noise": {
        "frames": 5 * 9 + 1,
        "batch": 2,
        "config": ContextConfig(add_noise_to_video_latents=False),
    },
    "two": {"frames": 2 * 9 + 1, "batch": 2, "config": ContextConfig(video_noise_sigma_min=0, image_noise_sigma_max=1)},
    "in a pyramid": {"frames": 9, "pyramid": True},
    "the released sizes": {"frames": 70, "memory": MemoryConfig()},
}


@pytest.mark.parametrize("case", VIDEOS.values(), ids=VIDEOS)
def test_video(case, monkeypatch):
    seed, batch, config = fresh_seed(), case.get("batch", 1), case.get("config", ContextConfig())
    memory = case.get("memory", MEMORY)
    reference = Reference(monkeypatch, seed, pyramid=case.get("pyramid", False))
    videos = [pictures(seed, case["frames"], i) for i in range(batch)]
    given = videos[0] if batch == 1 else videos
    (expected,) = reference(PROMPTS[:batch], memory, video=given, **vars(config))
    clip = context.prepare_videos(given, batch, *reference.size, memory, reference.vae.config)
    history = context.from_video(reference.vae, clip, memory, config, reference.noise)
    compare("a video", history, expected, seed, memory)
    assert int(history.before) == case["frames"] // (4 * memory.frames_per_chunk - 3)  # positions count on from there
    assert len(reference.noise.drawn) == reference.draws_of_a_chunk


@pytest.mark.parametrize("anchor", ["first", "second"])
@pytest.mark.parametrize("given", [None, "image", "video"])
def test_anchors(given, anchor, monkeypatch):
    seed, memory = fresh_seed(), MemoryConfig(long=8, mid=2, recent=1, frames_per_chunk=3, anchor=anchor)
    reference = Reference(monkeypatch, seed, pyramid=False)
    frames = pictures(seed, 10)
    inputs = {None: {}, "image": {"image": frames[0]}, "video": {"video": frames}}[given]
    expected = reference(PROMPTS[:1], memory, chunks=4, **inputs)
    if given == "image":
        pixels = context.prepare_images(frames[0], 1, *reference.size)
        history = context.from_image(reference.vae, pixels, memory, ContextConfig(), reference.noise)
    elif given == "video":
        clip = context.prepare_videos(frames, 1, *reference.size, memory, reference.vae.config)
        history = context.from_video(reference.vae, clip, memory, ContextConfig(), reference.noise)
    else:
        history = empty(memory, 1, HEIGHT // 8, WIDTH // 8, 4)
    for seen, latents in zip(expected, reference.generated, strict=True):
        compare("chunks after an input", history, seen, seed, memory)
        history = push(history, jnp.asarray(channels_last(latents)), memory)


def test_preprocessing_is_that_of_diffusers():
    theirs = VideoProcessor(vae_scale_factor=8)
    for size in range(len(SIZES)):
        images = pictures(fresh_seed(), 3, size)
        for height, width in ((32, 48), (96, 16), (64, 64)):
            ours = preprocess_image(images[0], height, width)
            expected = theirs.preprocess(images[0], height=height, width=width)
            np.testing.assert_array_equal(ours[0], expected[0].permute(1, 2, 0).numpy())
            ours = preprocess_video(images, height, width)
            expected = theirs.preprocess_video(images, height=height, width=width)
            np.testing.assert_array_equal(ours[None], expected.permute(0, 2, 3, 4, 1).numpy())
    floats = np.random.default_rng(0).random((2, 32, 48, 3), np.float32)
    expected = theirs.preprocess_video(floats, height=32, width=48)
    np.testing.assert_array_equal(preprocess_video(floats, 32, 48)[None], expected.permute(0, 2, 3, 4, 1).numpy())
