"""Tiny diffusers pipelines with random weights, and a recorder of their random draws."""

from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, HeliosDMDScheduler, HeliosScheduler, HeliosTransformer3DModel
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

import helios_jax
from tests.parity.reference import channels_last, randomise

TOKENIZER = Path(helios_jax.__file__).parent / "assets" / "toy" / "tokenizer"
LATENTS_MEAN, LATENTS_STD = [0.1, -0.2, 0.3, 0.0], [1.1, 0.9, 1.3, 0.8]
PROMPTS = ["a red square moves right fast on a black background", "a blue plus &amp; a  bar"]


def parts(seed: int, *, amplify: bool = False) -> dict:
    """Everything but the scheduler: the released classes, tiny, with random weights."""
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
        base_dim=8,  # with fewer channels the norm divides by almost nothing, and rounding shows
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
    return {"tokenizer": tokenizer, "text_encoder": text, "vae": vae, "transformer": transformer}


def base(seed: int, scheduler: dict, *, amplify: bool = False) -> diffusers.HeliosPipeline:
    """The Base pipeline: one level."""
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], **scheduler)
    return diffusers.HeliosPipeline(scheduler=scheduler, **parts(seed, amplify=amplify))


def pyramid(seed: int, scheduler: dict, *, distilled: bool, zero_star: bool) -> diffusers.HeliosPyramidPipeline:
    """The Mid or the Distilled pipeline: three levels."""
    kind = HeliosDMDScheduler if distilled else HeliosScheduler
    options = {"is_distilled": distilled, "is_cfg_zero_star": zero_star}
    return diffusers.HeliosPyramidPipeline(scheduler=kind(**scheduler), **options, **parts(seed))


class Recorder:
    """Records what a pipeline draws, then hands it to ours in the same order (a block-noise field is one draw)."""

    def __init__(self, monkeypatch, module, pipe, seed: int):
        self.drawn: list[np.ndarray] = []
        self.sites: list[str] = []
        generator = torch.Generator().manual_seed(seed)

        def randn_tensor(shape, generator=None, device=None, dtype=None, own=generator):
            value = torch.randn(shape, generator=own)
            self.drawn.append(channels_last(value))
            return value.to(dtype or torch.float32)

        monkeypatch.setattr(module, "randn_tensor", randn_tensor)
        if not hasattr(pipe, "sample_block_noise"):
            return
        sample, draw = pipe.sample_block_noise, torch.randn

        def sample_block_noise(b, c, t, h, w, *rest, **named):
            white = []
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda *a, **k: white.append(draw(*a, **k)) or white[-1])
                out = sample(b, c, t, h, w, *rest, **named)
            field = white[0].view(b, c, t, h // 2, w // 2, 2, 2).permute(0, 1, 2, 3, 5, 4, 6).reshape(b, c, t, h, w)
            self.drawn.append(channels_last(field))
            return out

        monkeypatch.setattr(pipe, "sample_block_noise", sample_block_noise)

    def normal(self, site, shape):
        self.sites.append(site)
        value = self.drawn.pop(0)
        assert value.shape == tuple(shape)
        return value

    uniform = normal


def decoded_latents(monkeypatch, pipe) -> list[torch.Tensor]:
    """A list that will hold what the pipeline's VAE is given, chunk by chunk, normalized again."""
    latents, decode = [], pipe.vae.decode
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (LATENTS_MEAN, LATENTS_STD))
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **k: latents.append((z - mean) / std) or decode(z, **k))
    return latents
