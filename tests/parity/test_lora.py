"""LoRA against diffusers: how files are named and scaled, and what adapters add to a forward pass.

diffusers runs adapters with PEFT. Where that is not installed, its conversion of names is still compared, and numbers
with `scale * B @ A` added to its weights by hand.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

import diffusers  # noqa: E402
from diffusers.loaders.lora_pipeline import HeliosLoraLoaderMixin  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from helios_jax import lora  # noqa: E402
from helios_jax.models.transformer import Transformer  # noqa: E402
from helios_jax.pretrained import from_arrays  # noqa: E402
from tests import tiny  # noqa: E402
from tests.parity import pipelines  # noqa: E402
from tests.parity.reference import arrays, channels_last, check, randomise  # noqa: E402
from tests.parity.test_transformer import inputs, run_ours, run_theirs  # noqa: E402

SIZES = {
    "batch": 1, "frames": 2, "height": 4, "width": 6, "short": 2, "mid": 2, "long": 4, "half": False, "offset": 0,
    "text": 5,
}  # fmt: skip
LAYERS = {  # diffusers' name, Wan's
    **{
        f"blocks.{i}.attn{n}.{theirs}": f"blocks.{i}.{kind}_attn.{ours}"
        for i in range(2)
        for n, kind in ((1, "self"), (2, "cross"))
        for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    **{f"blocks.{i}.ffn.net.0.proj": f"blocks.{i}.ffn.0" for i in range(2)},
    **{f"blocks.{i}.ffn.net.2": f"blocks.{i}.ffn.2" for i in range(2)},
}
OTHERS = {
    "proj_out": "head.head",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
}
PATCHES = ("patch_embedding", "patch_short", "patch_mid", "patch_long")


@pytest.fixture(scope="module")
def theirs():
    return randomise(make(), 0)


def make():
    return diffusers.HeliosTransformer3DModel(**dataclasses.asdict(tiny.TRANSFORMER))


def ours(theirs, stacked: bool) -> Transformer:
    return from_arrays(Transformer.abstract(tiny.TRANSFORMER, stacked=stacked), arrays(theirs))


def factors(theirs, names, rng, rank=4):
    """Random A and B for modules of the torch model, as files hold them, at a scale that shows."""
    pairs = {}
    for name in names:
        weight = theirs.get_submodule(name).weight
        out, *inner = weight.shape
        down = rng.standard_normal((rank, *inner), np.float32) / np.sqrt(np.prod(inner))
        up = rng.standard_normal((out, rank, *[1] * (len(inner) - 1)), np.float32) / np.sqrt(rank)
        pairs[name] = (down, up)
    return pairs


def changed(theirs, changes):
    """A copy of the torch model with (scale, A, B, bias) added by hand."""
    model = make()
    model.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for name, (scale, down, up, bias) in changes:
            module = model.get_submodule(name)
            delta = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            module.weight += torch.from_numpy(scale * delta).reshape(module.weight.shape)
            if bias is not None:
                module.bias += torch.from_numpy(bias)
    return model.eval()


def expected(model, x):
    with torch.no_grad():
        return channels_last(run_theirs(model, x))


@pytest.mark.parametrize("stacked", [False, True])
def test_two_files_add_up_beside_and_in_the_weights(theirs, stacked):
    """Every linear layer and memory patch; ranks, alphas and scales differ, biases in one of them."""
    rng = np.random.default_rng(1)
    x = inputs(tiny.TRANSFORMER, SIZES, 2)
    first = factors(theirs, [*LAYERS, *OTHERS, *PATCHES], rng)
    second = factors(theirs, [n for n in LAYERS if n.startswith("blocks.1")], rng, rank=3)
    bias = {n: rng.standard_normal(len(up)).astype(np.float32) for n, (_, up) in second.items()}
    files = {
        "first": {f"transformer.{n}.lora_{'AB'[i]}.weight": p[i] for n, p in first.items() for i in (0, 1)},
        "second": {f"lora_unet_{n}.lora_{('down', 'up')[i]}.weight": p[i] for n, p in second.items() for i in (0, 1)}
        | {f"lora_unet_{n}.alpha": np.array(1.5) for n in second}
        | {f"lora_unet_{n}.diff_b": value for n, value in bias.items()},
    }  # fmt: skip
    loaded = {name: lora.from_arrays(file) for name, file in files.items()}
    by_hand = changed(
        theirs,
        [(n, (0.7, *pair, None)) for n, pair in first.items()]
        + [(n, (-2.0 * 1.5 / 3, *pair, -2.0 * bias[n])) for n, pair in second.items()],
    )
    target = expected(by_hand, x)
    model = lora.attach(ours(theirs, stacked), loaded, {"first": 0.7, "second": -2.0})
    check("LoRA, beside the weights", run_ours(model, x), target, 1e-5)
    check("LoRA, merged", run_ours(lora.merge(model), x), target, 1e-5)
    assert np.abs(target - expected(theirs, x)).max() > 0.1


def test_names_and_scales_of_wan_files_are_diffusers(theirs):
    """diffusers folds alpha into A: products agree. It gives up on alpha beyond the blocks, so there is none here."""
    rng = np.random.default_rng(3)
    pairs = factors(theirs, [*LAYERS, *OTHERS], rng)
    state = {}
    for name, (down, up) in pairs.items():
        wan = {**LAYERS, **OTHERS}[name]
        state[f"diffusion_model.{wan}.lora_down.weight"] = down
        state[f"diffusion_model.{wan}.lora_up.weight"] = up
        state[f"diffusion_model.{wan}.diff_b"] = rng.standard_normal(len(up)).astype(np.float32)
        if name in LAYERS:
            state[f"diffusion_model.{wan}.alpha"] = np.array(rng.uniform(0.5, 8), np.float32)
    for i in range(2):  # norms: diffusers drops them
        state[f"diffusion_model.blocks.{i}.norm3.diff"] = np.zeros(32, np.float32)
        state[f"diffusion_model.blocks.{i}.self_attn.norm_q.diff"] = np.zeros(32, np.float32)
    compare_names(state)


def test_names_and_scales_of_musubi_files_are_diffusers(theirs):
    rng = np.random.default_rng(4)
    state = {}
    for name, (down, up) in factors(theirs, LAYERS, rng, rank=2).items():
        flat = LAYERS[name].replace(".", "_")
        state[f"lora_unet_{flat}.lora_down.weight"] = down
        state[f"lora_unet_{flat}.lora_up.weight"] = up
        state[f"lora_unet_{flat}.alpha"] = np.array(rng.uniform(0.5, 8), np.float32)
    compare_names(state)


def compare_names(state):
    converted = HeliosLoraLoaderMixin.lora_state_dict({k: torch.tensor(v) for k, v in state.items()})  # scales in place
    file = lora.from_arrays(state)
    with_weights = {name: change for name, change in file.changes.items() if change.rank}
    assert {f"transformer.{name}.lora_A.weight" for name in with_weights} == {
        key for key in converted if key.endswith("lora_A.weight")
    }
    for name, change in with_weights.items():
        product = change.scaling * change.up.read() @ change.down.read()
        reference = converted[f"transformer.{name}.lora_B.weight"] @ converted[f"transformer.{name}.lora_A.weight"]
        np.testing.assert_allclose(product, reference.numpy(), atol=1e-6)
        if (bias := converted.get(f"transformer.{name}.lora_B.bias")) is not None:
            np.testing.assert_array_equal(change.diff_b.read(), bias.numpy())


def test_a_head_given_as_a_whole_difference(theirs):
    """As in distilled Wan 2.2 files: diffusers makes it A, with the identity as B."""
    rng = np.random.default_rng(5)
    state = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": rng.standard_normal((2, 32)).astype(np.float32),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": rng.standard_normal((32, 2)).astype(np.float32),
        "diffusion_model.head.head.diff": rng.standard_normal((16, 32)).astype(np.float32),
        "diffusion_model.head.head.diff_b": rng.standard_normal(16).astype(np.float32),
    }
    converted = HeliosLoraLoaderMixin.lora_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    by_hand = changed(theirs, [
        (name, (1.0, *(converted[f"transformer.{name}.lora_{x}.weight"].numpy() for x in "AB"), bias))
        for name, bias in (
            ("blocks.0.attn1.to_q", None),
            ("proj_out", converted["transformer.proj_out.lora_B.bias"].numpy()),
        )
    ])  # fmt: skip
    x = inputs(tiny.TRANSFORMER, SIZES, 6)
    model = lora.attach(ours(theirs, False), {"head": lora.from_arrays(state)})
    check("LoRA, beside the weights", run_ours(model, x), expected(by_hand, x), 1e-5)


# --- with PEFT -------------------------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def test_diffusers_runs_our_files(theirs, peft, tmp_path):
    """What `add` makes and `save` writes, through `load_lora_weights`, `set_adapters` and `fuse_lora`."""
    pipe = pipelines.base(0, {})
    pipe.set_progress_bar_config(disable=True)
    randomise(pipe.transformer, 0)
    x = inputs(tiny.TRANSFORMER, SIZES, 7)
    base = expected(pipe.transformer, x)
    model = ours(pipe.transformer, stacked=True)
    names = ["to_q", "ffn.net.2", "proj_out", "patch_short", "patch_long"]
    model = lora.add(model, lora.LoRAConfig(3, alpha=6, target_modules=names, name="a"), jax.random.key(0))
    model = lora.add(model, lora.LoRAConfig(2, target_modules=r"blocks\.1\..*", name="b"), jax.random.key(1))
    model = trained(model)
    for name in ("a", "b"):
        pipe.load_lora_weights(lora.save(model, tmp_path / name, name).parent, adapter_name=name)
    pipe.set_adapters(["a", "b"], adapter_weights=[0.5, 2.0])
    model = lora.set_scale(lora.set_scale(model, "a", 0.5), "b", 2.0)
    target = expected(pipe.transformer, x)
    assert np.abs(target - base).max() > 0.1
    check("LoRA, PEFT's adapters", run_ours(model, x), target, 1e-5)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    check("LoRA, PEFT's fused weights", run_ours(lora.merge(model), x), expected(pipe.transformer, x), 1e-5)


def trained(model):
    """B is zero before training."""
    rng = np.random.default_rng(8)
    for module in (module for _, module in lora.adapters.adapted(model)):
        for adapter in module.adapters:
            noise = rng.standard_normal(adapter.b.shape).astype(np.float32) * np.asarray(adapter.a[...].any())
            used = np.asarray(jnp.any(adapter.a[...] != 0, axis=tuple(range(adapter.scaling.ndim, adapter.a.ndim))))
            adapter.b[...] = jnp.asarray(noise * used[..., None, None])
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("folder", ["diffusers", "adapter", "peft"])
def test_we_run_their_files(theirs, peft, tmp_path, folder, rslora):
    """As training with diffusers saves them, as `save_lora_adapter` does, and as PEFT alone does."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        rank_pattern={"to_k": 2},
        alpha_pattern={"ffn.net.0.proj": 16},
        target_modules=["to_q", "to_k", "to_out.0", "ffn.net.0.proj", "time_proj", "linear_1", "patch_mid"],
        lora_bias=True,
        use_rslora=rslora,
    )
    model = make()
    model.load_state_dict(theirs.state_dict())
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    if folder == "diffusers":
        layers = peft.get_peft_model_state_dict(model)
        metadata = model.peft_config["default"].to_dict()
        diffusers.HeliosPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )
    elif folder == "adapter":
        model.save_lora_adapter(tmp_path)
    else:
        layers = {f"base_model.model.{k}": v for k, v in peft.get_peft_model_state_dict(model).items()}
        save_file({k: v.contiguous() for k, v in layers.items()}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({**config.to_dict(), "target_modules": []}, default=str)
        )
    x = inputs(tiny.TRANSFORMER, SIZES, 10)
    target = expected(model.eval(), x)
    for stacked in (False, True):
        check("LoRA, PEFT's adapters", run_ours(lora.attach(ours(theirs, stacked), {"a": tmp_path}), x), target, 1e-5)
    assert np.abs(target - expected(theirs, x)).max() > 0.1


def test_initial_values_are_distributed_as_peft_s(theirs, peft):
    for ours_init, theirs_init in (("kaiming", True), ("gaussian", "gaussian")):
        model = make()
        config = {"r": 64, "target_modules": ["to_q", "ffn.net.2", "patch_long"]}
        model.add_adapter(peft.LoraConfig(**config, init_lora_weights=theirs_init))
        new = lora.LoRAConfig(64, target_modules=config["target_modules"], init=ours_init)
        got = lora.add(ours(theirs, False), new, jax.random.key(0))
        for module, a in (
            (model.blocks[0].attn1.to_q, got.blocks[0].attn1.to_q),
            (model.blocks[1].ffn.net[2], got.blocks[1].ffn.down),
            (model.patch_long, got.patch_long),
        ):
            expected = module.lora_A["default"].weight.detach().numpy()
            values = np.asarray(a.adapters[0].a[...])
            np.testing.assert_allclose(values.std(), expected.std(), rtol=0.1)
            if ours_init == "kaiming":
                np.testing.assert_allclose(np.abs(values).max(), np.abs(expected).max(), rtol=0.02)
            assert not np.asarray(a.adapters[0].b[...]).any()
