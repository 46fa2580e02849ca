"""The throughput benchmark: operations as published and as traced, the arithmetic, a run without a reference."""

import json

import jax
import jax.numpy as jnp
import pytest

from helios_jax.benchmarks import throughput, throughput_model, throughput_reference
from helios_jax.benchmarks import throughput_flops as flops
from helios_jax.benchmarks.throughput_report import Comparison
from helios_jax.models.layers import Shapes
from helios_jax.models.transformer import FrameIndices, HistoryLatents, Transformer, TransformerConfig
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig
from helios_jax.runtime.flops import traced


@pytest.mark.parametrize(("noisy", "tflop"), [(540, 69.7), (2160, 119.0), (8640, 359.5)])
def test_a_pass_of_the_released_transformer(noisy, tflop):
    config, history = TransformerConfig(), 2400
    # The known figures are the reference's: text and the last block's history computed in every pass.
    saved = flops.text_kv(config, 512) + 4 * history * config.dim * (config.dim + config.ffn_dim + noisy + history)
    assert (flops.transformer_pass(config, noisy, history, 512) + saved) / 1e12 == pytest.approx(tflop, rel=0.005)


def test_the_released_text_encoder_and_autoencoder():
    assert flops.text_encoder(UMT5Config(), 512) / 1e12 == pytest.approx(4.8, rel=0.03)
    vae = AutoencoderKLWan(VAEConfig(), rngs=Shapes())
    latents = jax.ShapeDtypeStruct((1, 9, 48, 80, 16), jnp.float32)
    assert traced(AutoencoderKLWan.decode, vae, latents) / 1e12 == pytest.approx(69, rel=0.05)


def test_formulas_count_what_is_traced():
    size = throughput_model.SIZES["tiny"]
    text = UMT5Encoder(size.text_encoder, rngs=Shapes())
    ids = jax.ShapeDtypeStruct((1, 24), jnp.int32)
    assert traced(lambda m, x: m(x, x), text, ids) == flops.text_encoder(size.text_encoder, 24)

    model = Transformer.abstract(size.transformer)

    def latents(frames, side=8):
        return jax.ShapeDtypeStruct((1, frames, side, side, 16), jnp.float32)

    def run(model, noisy, short, mid, long, text):
        indices = FrameIndices(*(jnp.arange(x.shape[1])[None] for x in (noisy, short, mid, long)))
        kv = model.text_kv(text)
        return model(noisy, jnp.zeros(1), kv, HistoryLatents(short, mid, long), indices)

    words = jax.ShapeDtypeStruct((1, 24, 16), jnp.float32)
    got = traced(run, model, latents(9), latents(2), latents(2), latents(16), words)
    history = 2 * 16 + 4 + 4
    expected = flops.transformer_pass(size.transformer, 9 * 16, history, 24) + flops.text_kv(size.transformer, 24)
    # Patches of coarser frames and the time embedding are not in the formula.
    assert expected < got < 1.2 * expected


def test_the_ratio_is_that_of_pairs():
    comparison = Comparison("x", [1.0, 2.0, 4.0], [3.0, 4.0, 20.0], tflop=1.0, frames=33)
    facts = comparison.facts(rate=1e12)
    assert (facts["ours_s"], facts["reference_s"], facts["ratio"]) == (2.0, 4.0, 3.0)
    assert (facts["floor_s"], facts["floor_share"], facts["frames_per_s"]) == (1.0, 0.5, 16.5)
    assert Comparison("x", [1.0]).ratio is None


@pytest.mark.heavy
def test_without_diffusers_ours_is_measured_alone_and_the_report_says_so(monkeypatch, tmp_path, capsys):
    def missing(*_):
        raise ModuleNotFoundError("the reference needs diffusers, which is not installed: pip install diffusers")

    monkeypatch.setattr(throughput, "Reference", missing)
    assert throughput.main(["--size", "tiny", "--repeats", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "tiny-cpu.json").read_text())
    assert report["reference"] is None
    assert any("pip install diffusers" in note for note in report["notes"])
    assert [row["ratio"] for row in report["comparisons"]] == [None] * 7
    assert all(row["ours_s"] > 0 and row["tflop"] > 0 for row in report["comparisons"])
    page = (tmp_path / "tiny-cpu.md").read_text()
    assert "pip install diffusers" in page
    assert "end to end, 1+1+1, 33 frames" in capsys.readouterr().out


@pytest.mark.reference
def test_the_reference_has_our_weights():
    pytest.importorskip("diffusers")
    size = throughput_model.SIZES["tiny"]
    ours = throughput.Ours(throughput_model.make(size, jnp.float32, stacked=False), size, 1)
    reference = throughput_reference.Reference(ours.pipe, size)
    assert all(error < 1e-4 for error in ours.agreement(reference).values())
    assert set(reference.parts([1, 1, 1])) == set(ours.parts())
