"""The whole Base pipeline against diffusers': a folder it saved, its noise recorded, three chunks."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

import diffusers  # noqa: E402
from diffusers import AutoencoderKLWan, HeliosScheduler, HeliosTransformer3DModel  # noqa: E402
from diffusers.pipelines.helios import pipeline_helios  # noqa: E402
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel  # noqa: E402

import helios_jax  # noqa: E402
from helios_jax import HeliosPipeline  # noqa: E402
from tests.parity.reference import channels_last, check, randomise  # noqa: E402

TOKENIZER = Path(helios_jax.__file__).parent / "assets" / "toy" / "tokenizer"
LATENTS_MEAN, LATENTS_STD = [0.1, -0.2, 0.3, 0.0], [1.1, 0.9, 1.3, 0.8]
PROMPTS = ["a red square moves right fast on a black background", "a blue plus &amp; a  bar"]


def build(seed: int, scheduler: dict, amplify: bool = False) -> diffusers.HeliosPipeline:
    """A tiny pipeline of the released classes, with random weights."""
    transformer = HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_dim=(4, 6, 6),
        is_amplify_history=amplify,
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
    )
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    )
    for i, part in enumerate((transformer, vae, text)):
        randomise(part, seed + i)
    return diffusers.HeliosPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        vae=vae,
        scheduler=HeliosScheduler(stages=1, stage_range=[0, 1], **scheduler),
        transformer=transformer,
    )


class Recorder:
    """Hands our pipeline the draws of the reference, in the order in which they were made."""

    def __init__(self, monkeypatch, seed: int):
        self.drawn: list[np.ndarray] = []
        self.sites: list[str] = []
        generator = torch.Generator().manual_seed(seed)

        def randn_tensor(shape, generator_=None, device=None, dtype=None, **_):
            value = torch.randn(shape, generator=generator, dtype=torch.float32)
            self.drawn.append(channels_last(value))
            return value.to(dtype or torch.float32)

        monkeypatch.setattr(pipeline_helios, "randn_tensor", lambda shape, **kw: randn_tensor(shape, **kw))

    def normal(self, site, shape):
        self.sites.append(site)
        value = self.drawn.pop(0)
        assert value.shape == tuple(shape)
        return value

    uniform = normal


CASES = {
    "unipc, dynamic shift, guidance": (
        {"use_dynamic_shifting": True, "time_shift_type": "exponential"},
        {"guidance_scale": 5.0, "num_inference_steps": 6, "negative_prompt": "blurred"},
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
        {"guidance_scale": 1.0, "num_inference_steps": 4, "max_sequence_length": 7},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_latents_and_frames_over_three_chunks(name, tmp_path, monkeypatch):
    scheduler, options = CASES[name]
    seed = int(np.random.default_rng().integers(2**31))
    reference = build(seed, scheduler, amplify=name.startswith("euler"))
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    reference.set_progress_bar_config(disable=True)
    options = {"prompt": PROMPTS[0], "height": 32, "width": 48, "max_sequence_length": 24, **options}
    frames = 3 * (4 * (options.get("num_latent_frames_per_chunk", 9) - 1) + 1)

    noise = Recorder(monkeypatch, seed)
    decoded = []
    decode = reference.vae.decode
    monkeypatch.setattr(reference.vae, "decode", lambda z, **kw: decoded.append(z) or decode(z, **kw))
    expected = reference(**options, num_frames=frames, output_type="np").frames
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (LATENTS_MEAN, LATENTS_STD))
    expected_latents = channels_last((torch.cat(decoded, 2) - mean) / std)
    drawn = list(noise.drawn)

    ours = HeliosPipeline.from_pretrained(tmp_path)
    latents = ours(**options, num_frames=frames, output_type="latent", noise=noise).frames
    assert noise.sites == ["latents"] * 3
    check("pipeline, latents of three chunks", latents, expected_latents, 1e-4, f"seed {seed}")
    noise.drawn = drawn
    video = ours(**options, num_frames=frames, noise=noise).frames
    assert video.shape[1] == frames  # the reference drops some
    check("pipeline, frames of three chunks", video[:, : expected.shape[1]], expected, 1e-3, f"seed {seed}")
