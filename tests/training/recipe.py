"""The runs of configs/ on a tiny model and random records, small enough for a test of each."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from helios_jax import pretrained
from helios_jax.data import records
from helios_jax.data.records import EMPTY_TEXT, NEGATIVE_TEXT
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.training import loop
from tests import tiny

ROOT = Path(__file__).parents[2]
SIZES = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=48,
    num_layers=1,
    rope_dim=(8, 4, 4),  # as Wan splits 16
)
TEXT = (5, 16)
SIDE = 8  # of the latents; two levels


def build(root: Path, sizes: TransformerConfig = SIZES, side: int = SIDE) -> None:
    """Writes what runs begin with into `root`: helios, teacher, latents of `side`, ode."""
    rng = np.random.default_rng(0)
    for name in ("helios", "teacher"):
        model = tiny.draw(Transformer.abstract(sizes), rng)
        pretrained.save_model(model, sizes, root / name / "transformer", dtype=jnp.float32)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    def clip(i: int) -> records.Example:
        return {"latents": normal(3, 9, side, side, 4), "text": normal(*TEXT), "id": f"clip {i}"}

    def pair(i: int) -> records.Example:
        made = {"history": normal(19, side, side, 4), "anchor": normal(1, side, side, 4), "text": normal(*TEXT)}
        for level, size in enumerate((side // 2, side)):
            times = np.linspace(1, 0.5, 2, dtype=np.float32)
            made |= {f"latents_{level}": normal(3, 9, size, size, 4)}
            made |= {f"timesteps_{level}": 1000 * times, f"sigmas_{level}": times}
        return {**made, "chunk": np.int32(1 + i % 2), "id": f"pair {i}"}

    for name, make in (("latents", clip), ("ode", pair)):
        examples = [make(i) for i in range(6)]
        features: dict[str, Any] = {
            key: records.text() if isinstance(x, str) else records.tensor(x.shape, x.dtype)
            for key, x in examples[0].items()
        }
        records.write(root / name, features, {"train": examples})
    np.save(root / "latents" / EMPTY_TEXT, np.zeros(TEXT, np.float16))
    np.save(root / "latents" / NEGATIVE_TEXT, normal(*TEXT))


def arguments(stage: str, root: Path, run: Path, *more: str) -> list[str]:
    """The command line of `stage`, at sizes and learning rates for a few steps on one device."""
    ours = [
        f"run={run}",
        f"init={root}/helios",
        f"data.folder={root}/{'ode' if stage == 'stage3_ode' else 'latents'}",
        "steps=3",
        "precision=float32",
        "data.batch_size=4",
        "optim.accumulate=1",
        "optim.lr=1e-2",
        "optim.warmup_steps=0",
        "lora.rank=3",
        "mesh.fsdp=1",
        "flow.components=null",
        "validation=null",
    ]
    if stage.startswith(("stage2", "stage3")):
        ours += ["flow.pyramid.stage_range=[0,0.5,1]"]
    if stage.startswith("stage2"):
        ours += ["flow.pyramid.sample_ratios=[1,1]"]
    if stage.startswith("stage3"):
        ours += ["distill.steps=[1,1]", "optim.ema.start=1", "remat=null"]  # compiles faster
    if stage in ("stage3_post", "stage3_gan"):
        ours += [
            f"distill.score.init={root}/teacher",
            "distill.critic.lora.rank=2",
            "distill.critic.optim.lr=1e-2",
            "distill.critic.steps_per_generator=2",
            "distill.amplify_first_chunk=false",
            "optim.ema.every=2",
        ]
    if stage == "stage3_gan":
        ours += ["distill.gan.start=0", "distill.gan.crop=null"]
        ours += ["distill.gan.discriminator={blocks: [0], output: false, dim: 64}"]
    return [str(ROOT / "configs" / f"{stage}.yaml"), *ours, *more]


def host(tree: Any) -> Any:
    """A tree of arrays as numpy ones: the loop uses their memory again."""
    return jax.tree.map(np.array, tree)


def run(patch: pytest.MonkeyPatch, argv: list[str]) -> tuple[Any, Any]:
    """`train.main(argv)`: the states that its loop begins and ends with."""
    seen: list[Any] = []
    original = loop.run

    def spied(step: Any, state: Any, *rest: Any) -> Any:
        seen.append(host(state))
        state, stopped = original(step, state, *rest)
        seen.append(host(state))
        return state, stopped

    with patch.context() as patched:
        patched.setattr(loop, "run", spied)
        assert train.main(argv) == 0
    begin, end = seen
    return begin, end
