"""Images and videos as the sampler's history: what is accepted, what is refused, what is held and encoded."""

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.media.mp4 import VideoWriter
from helios_jax.media.video import read_video
from helios_jax.models.layers import Shapes
from helios_jax.models.vae import AutoencoderKLWan
from helios_jax.sampling import context
from helios_jax.sampling.context import (
    ContextConfig,
    from_image,
    from_video,
    prepare_images,
    prepare_videos,
)
from helios_jax.sampling.noise import SeededNoise
from tests import tiny
from tests.closeness import assert_close
from tests.pixels import preprocess_image, preprocess_video

SIZE = (16, 24)
MEMORY = MemoryConfig(long=3, mid=1, recent=1, frames_per_chunk=2)  # chunks of 5 frames, 3 of them reach the window
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (23, 30, 20, 3), np.uint8)
CLEAN = ContextConfig(add_noise_to_image_latents=False, add_noise_to_video_latents=False)


@pytest.fixture(scope="module")
def vae():
    return tiny.draw(AutoencoderKLWan(tiny.VAE, rngs=Shapes()), np.random.default_rng(1))


class Zeros:
    """No randomness: posterior means, the lower sigmas; notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def normal(self, site, shape):
        self.asked.append((site, shape))
        return np.zeros(shape, np.float32)

    uniform = normal


def clip_of(video, batch=1, **options):
    return prepare_videos(video, batch, *SIZE, MEMORY, tiny.VAE, **options)


def write(path, frames=FRAMES, fps=24):
    with VideoWriter(path, fps, *frames.shape[1:3]) as video:
        video.write(frames)
    return path


# --- reading and resizing ---


def test_every_kind_of_image_gives_the_same_pixels(tmp_path):
    array = FRAMES[0]
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    expected = preprocess_image(image, *SIZE)
    assert expected.shape == (1, *SIZE, 3)
    assert expected.dtype == np.float32
    assert -1 <= expected.min() < -0.5
    assert 0.5 < expected.max() <= 1
    for same in (array, tmp_path / "a.png", str(tmp_path / "a.png"), image.convert("RGBA")):
        np.testing.assert_array_equal(preprocess_image(same, *SIZE), expected)
    own = preprocess_image(array, *array.shape[:2])[0]
    assert_close(own, array / 127.5 - 1)
    np.testing.assert_array_equal(preprocess_image(array / np.float32(255), *array.shape[:2])[0], own)


def test_a_file_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.png", exif=exif)
    turned = preprocess_image(np.rot90(FRAMES[0], -1), 20, 32)
    np.testing.assert_array_equal(preprocess_image(tmp_path / "a.png", 20, 32), turned)


def test_every_kind_of_video_gives_the_same_pixels(tmp_path):
    read, _ = read_video(write(tmp_path / "a.mp4"))
    expected = preprocess_video(read, *SIZE)
    assert expected.shape == (23, *SIZE, 3)
    for same in (tmp_path / "a.mp4", list(read), [Image.fromarray(frame) for frame in read]):
        np.testing.assert_array_equal(preprocess_video(same, *SIZE), expected)
    np.testing.assert_array_equal(preprocess_video(tmp_path / "a.mp4", *SIZE, fps=12), expected[::2])


def test_a_clip_is_the_first_frame_and_whole_chunks_from_the_end(tmp_path):
    pixels = preprocess_video(FRAMES, *SIZE)
    clip = clip_of(FRAMES)
    np.testing.assert_array_equal(clip.first, pixels[None, :1])
    np.testing.assert_array_equal(clip.tail, pixels[None, -15:])
    assert clip.num_chunks == 4
    short = clip_of(FRAMES[:9])
    np.testing.assert_array_equal(short.tail, pixels[None, 4:9])
    assert short.num_chunks == 1
    # One video for all, or one each: a list of images is one video.
    assert clip_of(list(FRAMES), batch=3).first.shape == (1, 1, *SIZE, 3)
    both = clip_of([FRAMES[:10], list(FRAMES[10:20])], batch=2)
    np.testing.assert_array_equal(both.tail, np.stack([pixels[:10], pixels[10:20]]))
    np.testing.assert_array_equal(clip_of(np.stack([FRAMES, FRAMES[::-1]]), batch=2).first[1], pixels[None, -1])
    files = [write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4", FRAMES[::-1])]
    assert clip_of(files, batch=2).tail.shape == (2, 15, *SIZE, 3)
    assert clip_of(files[0], fps=12).num_chunks == 2


def test_a_long_file_is_never_held_as_a_whole(tmp_path, monkeypatch):
    held = most = 0

    class Frame(np.ndarray):
        def __del__(self):
            nonlocal held
            held -= 1

    def frames(path, fps):
        nonlocal held, most
        for i in range(200):
            held += 1
            most = max(most, held)
            yield np.full((8, 8, 3), i, np.uint8).view(Frame)

    resized = []
    monkeypatch.setattr(context, "iterate_video", frames)
    monkeypatch.setattr(context, "resize", lambda x, h, w: resized.append(int(x[0, 0, 0])) or np.zeros((h, w, 3)))
    assert clip_of("long.mp4").num_chunks == 40
    assert most <= 15 + 3
    assert resized == [0, *range(185, 200)]


def test_images_for_one_or_for_each():
    assert prepare_images(FRAMES[0], 3, *SIZE).shape == (1, 1, *SIZE, 3)
    both = prepare_images([FRAMES[0], Image.fromarray(FRAMES[1])], 2, *SIZE)
    np.testing.assert_array_equal(both[1], preprocess_image(FRAMES[1], *SIZE))
    np.testing.assert_array_equal(prepare_images(FRAMES[:2], 2, *SIZE), both)


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    data = write(tmp_path / "short.mp4", FRAMES[:4]).read_bytes()
    (tmp_path / "broken.mp4").write_bytes(data[:-300])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))

    def image(x, batch=1):
        return lambda: prepare_images(x, batch, *SIZE)

    def video(x, batch=1, **options):
        return lambda: clip_of(x, batch, **options)

    floats = FRAMES[0].astype(np.float32)
    cases = [
        (image(floats), "image: floats must be from 0 to 1, got 0 to 255"),
        (image([FRAMES[0], floats / 127.5 - 1], 2), "image 1: floats must be from 0 to 1, got -1 to 1"),
        (image(np.full((8, 8, 3), np.nan)), "floats must be from 0 to 1"),
        (image(FRAMES[0, :, :, 0]), "image: must be an image or an array"),
        (image(FRAMES[0].transpose(2, 0, 1)), r"got uint8 \[3, 30, 20\]"),
        (image(FRAMES[0].astype(int)), r"uint8 or float, got int64 \[30, 20, 3\]"),
        (image([FRAMES[0]] * 2, 3), "2 images for 3 prompts: give one image for all, or as many as prompts"),
        (image([]), "0 images for 1 prompts"),
        (image(tmp_path / "broken.png"), "broken.png: "),
        (video(tmp_path / "sound.mp4"), "sound.mp4: holds no video, only audio"),
        (video(tmp_path / "broken.mp4"), "broken.mp4: "),
        (video(tmp_path / "short.mp4"), "short.mp4: 4 frames, fewer than the 5 of a chunk; give a longer video"),
        (video(tmp_path / "short.mp4", fps=12), "short.mp4: 2 frames at 12 frames a second, fewer than the 5"),
        (video(tmp_path / "short.mp4", fps=0), "the rate must be positive"),
        (video(FRAMES, fps=12), "video: fps is for files"),
        (video(FRAMES[:4]), "video: 4 frames, fewer than the 5 of a chunk"),
        (video([]), "video: must be a file, a list of images or an array"),
        (video(FRAMES[0]), r"video: must be .* got uint8 \[30, 20, 3\]"),
        (video(FRAMES.astype(np.float32)), "frame of video: floats must be from 0 to 1"),
        (video([FRAMES, FRAMES], 3), "2 videos for 3 prompts"),
        (video([FRAMES, FRAMES[:10]], 2), r"videos of one batch must be equally long, got \[23, 10\] frames"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    for call in (image(tmp_path / "none.png"), video(tmp_path / "none.mp4"), video([tmp_path / "none.mp4"])):
        with pytest.raises(FileNotFoundError, match=r"none\.(png|mp4): no such file"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_noise_sigma_min": 0.2}, "image_noise_sigma_min must be from 0 to image_noise_sigma_max"),
        ({"video_noise_sigma_min": -0.1}, "video_noise_sigma_min must .* got -0.1 and 0.135"),
        ({"video_noise_sigma_max": 1.5}, "and that at most 1"),
        ({"image_noise_sigma_max": float("nan")}, "image_noise_sigma_min"),
    ],
)
def test_sigmas_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ContextConfig(**options)


# --- histories ---


def latents_of(vae, pixels):
    return np.asarray(context._posterior(vae, jnp.asarray(pixels))[0])  # the tiny VAE's latents need no normalizing


def test_an_image_is_the_anchor_and_its_stillness_the_newest_frame(vae):
    pixels = prepare_images(FRAMES[0], 2, *SIZE)
    history = from_image(vae, pixels, MEMORY, CLEAN, Zeros(), batch=2)
    assert history.latents.shape == (2, 5, 2, 3, 4)
    np.testing.assert_array_equal(history.latents[:, :-1], 0)
    still = latents_of(vae, np.repeat(pixels, 5, 1))
    for sample in range(2):
        assert_close(history.latents[sample, -1], still[0, -1])
        assert_close(history.anchor[sample], still[0, :1])
    alone, _ = jax.jit(AutoencoderKLWan.encode)(vae, jnp.asarray(pixels))
    assert_close(history.anchor[0], alone[0])
    assert bool(history.anchored)
    assert int(history.chunk) == 0


def test_a_video_is_the_newest_frames_and_its_first_frame_the_anchor(vae):
    clip = clip_of(FRAMES)
    history = from_video(vae, clip, MEMORY, CLEAN, Zeros())
    chunks = [latents_of(vae, clip.tail[:, i : i + 5]) for i in (0, 5, 10)]
    assert_close(history.latents, np.concatenate(chunks, 1)[:, -5:])
    assert_close(history.anchor, latents_of(vae, np.repeat(clip.first, 5, 1))[:, :1])
    short = from_video(vae, clip_of(FRAMES[-7:]), MEMORY, CLEAN, Zeros())
    np.testing.assert_array_equal(short.latents[:, :3], 0)
    assert_close(short.latents[:, 3:], chunks[2])


def test_each_draw_is_asked_for_once_and_only_what_is_seen_is_encoded(vae, monkeypatch):
    encoded, posterior = [], context._posterior
    monkeypatch.setattr(context, "_posterior", lambda vae, x: encoded.append(x.shape) or posterior(vae, x))
    noise, one, chunk = Zeros(), (2, 1, 2, 3, 4), (2, 2, 2, 3, 4)
    from_video(vae, clip_of(FRAMES, batch=2), MEMORY, ContextConfig(), noise, batch=2)
    assert encoded == [(1, 5, *SIZE, 3)] * 4  # one program
    assert noise.asked == [
        ("first_frame_posterior", one),
        *[("video_posterior", chunk)] * 4,
        ("first_frame_sigma", (1,)),
        ("first_frame_noise", one),
        *[("video_sigma", (2,)), ("video_noise", chunk)] * 4,
    ]
    noise = Zeros()
    from_image(vae, prepare_images(FRAMES[0], 2, *SIZE), MEMORY, ContextConfig(), noise, batch=2)
    assert noise.asked == [
        ("image_posterior", one),
        ("fake_image_posterior", chunk),
        ("image_sigma", (1,)),
        ("image_noise", one),
        ("fake_image_sigma", (1,)),
        ("fake_image_noise", one),
    ]


def test_noise_follows_the_sigmas_and_the_seed(vae):
    pixels = prepare_images(FRAMES[0], 1, *SIZE)
    config = ContextConfig(image_noise_sigma_min=1.0, image_noise_sigma_max=1.0, video_noise_sigma_min=0.0)
    history = from_image(vae, pixels, MEMORY, config, SeededNoise(3))
    assert_close(history.anchor, SeededNoise(3).normal("image_noise", (1, 1, 2, 3, 4)))
    again, other = (from_image(vae, pixels, MEMORY, config, SeededNoise(seed)) for seed in (3, 4))
    np.testing.assert_array_equal(again.latents, history.latents)
    assert np.abs(other.latents - history.latents).max() > 1e-3
    both = from_image(vae, pixels, MEMORY, config, SeededNoise(3), batch=2)
    assert np.abs(both.anchor[0] - both.anchor[1]).max() > 0.1  # one image, random draws for each video


def test_noise_of_a_wrong_shape_is_refused(vae):
    class Wrong(Zeros):
        def uniform(self, site, shape):
            return np.zeros((3,), np.float32)

    with pytest.raises(ValueError, match="image_sigma"):
        from_image(vae, prepare_images(FRAMES[0], 1, *SIZE), MEMORY, ContextConfig(), Wrong())
