"""Tiny diffusers pipelines with random weights, and a recorder of their random draws."""

from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, HeliosDMDScheduler, HeliosScheduler, HeliosTransformer3DModel
from diffusers.models.autoencoders import vae as autoencoders
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


def cholesky(covariance: torch.Tensor) -> torch.Tensor:
    """torch's factor of block noise's covariance, wherever it runs.

    The matrix is singular: whether rounding leaves a last pivot above zero in float32 depends on the CPU, and where it
    does not the pyramid pipelines stop. The pivot is then set to the one that the others compute (see `block_factor`).
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        factor[-1, -1] = (3 * 2.0**-24) ** 0.5
    return factor


class Recorder:
    """Records every draw of a pipeline's call, then hands them to ours in the same order, the kind of each checked.

    Those are the posterior samples of the VAE, the sigmas of input images and videos, noise, and block noise (whose
    field is one draw).
    """

    def __init__(self, monkeypatch, module, pipe, seed: int):
        self.drawn: list[tuple[str, np.ndarray]] = []
        self.sites: list[str] = []
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand

        def randn_tensor(shape, generator=None, device=None, dtype=None, own=generator):
            value = torch.randn(shape, generator=own)
            self.drawn.append(("normal", channels_last(value)))
            return value.to(dtype or torch.float32)

        def rand(*shape, own=generator, **kwargs):
            value = uniform(*shape, generator=own)
            self.drawn.append(("uniform", value.numpy()))
            return value

        monkeypatch.setattr(module, "randn_tensor", randn_tensor)
        monkeypatch.setattr(autoencoders, "randn_tensor", randn_tensor)
        monkeypatch.setattr(torch, "rand", rand)
        if not hasattr(pipe, "sample_block_noise"):
            return
        sample, draw = pipe.sample_block_noise, torch.randn

        def sample_block_noise(b, c, t, h, w, *rest, **named):
            white = []
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda *a, **k: white.append(draw(*a, **k)) or white[-1])
                patch.setattr(torch.linalg, "cholesky", cholesky)
                out = sample(b, c, t, h, w, *rest, **named)
            field = white[0].view(b, c, t, h // 2, w // 2, 2, 2).permute(0, 1, 2, 3, 5, 4, 6).reshape(b, c, t, h, w)
            self.drawn.append(("normal", channels_last(field)))
            return out

        monkeypatch.setattr(pipe, "sample_block_noise", sample_block_noise)

    def normal(self, site, shape):
        return self._next("normal", site, shape)

    def uniform(self, site, shape):
        return self._next("uniform", site, shape)

    def _next(self, kind, site, shape):
        self.sites.append(site)
        recorded, value = self.drawn.pop(0)
        assert (recorded, value.shape) == (kind, tuple(shape)), f"{site}: the reference drew {recorded} {value.shape}"
        return value


def decoded_latents(monkeypatch, pipe) -> list[torch.Tensor]:
    """A list that will hold what the pipeline's VAE is given, chunk by chunk, normalized again."""
    latents, decode = [], pipe.vae.decode
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (LATENTS_MEAN, LATENTS_STD))
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **k: latents.append((z - mean) / std) or decode(z, **k))
    return latents
