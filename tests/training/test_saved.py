"""Of each stage: every parameter that should move does, no other does, and all that moved is saved, bit for bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from helios_jax import lora
from helios_jax.lora import LoRAWeight
from helios_jax.models.transformer import Transformer
from helios_jax.pretrained import load_model
from helios_jax.training.trainable import AdapterConfig
from tests.training import recipe

PATCHES = ("patch_short", "patch_mid", "patch_long")
STAGES = (
    pytest.param("stage1_init", marks=pytest.mark.heavy),
    "stage1_post",
    pytest.param("stage2_init", marks=pytest.mark.heavy),
    pytest.param("stage2_post", marks=pytest.mark.heavy),
    "stage3_ode",
    pytest.param("stage3_gan", marks=pytest.mark.heavy),
)
EVERY_STEP = ("checkpoint.every=1", "checkpoint.keep=2")
# The convolutions that get adapters; every linear layer does.
CONVOLUTIONS = {
    "stage1_init": {"patch_embedding"},
    "stage1_post": {"patch_embedding"},
    "stage2_init": set(),
    "stage2_post": {"patch_embedding", *PATCHES},
    "stage3_ode": {*PATCHES},
    "stage3_gan": {*PATCHES},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    recipe.build(folder)
    return folder


@pytest.fixture(scope="module", params=STAGES)
def trained(request, root):
    """(stage, run's folder, state before, state after) of three steps through train.main."""
    stage = request.param
    begin, end = recipe.run(pytest.MonkeyPatch(), recipe.arguments(stage, root, root / stage, *EVERY_STEP))
    return stage, root / stage, begin, end


def values(model) -> dict[str, tuple[type, np.ndarray]]:
    """By path: the kind of a variable and its value."""
    return {
        ".".join(map(str, path)): (type(v), np.asarray(v.get_value()))
        for path, v in nnx.to_flat_state(nnx.state(model))
    }


def should_move(stage: str, name: str, kind: type) -> bool:
    if name.startswith("discriminator"):
        return True
    if stage.startswith("stage1") and name.split(".")[0] in PATCHES:
        return True
    return issubclass(kind, LoRAWeight)


def test_what_should_move_does_and_nothing_else(trained):
    stage, _, begin, end = trained
    before, after = values(begin.model), values(end.model)
    assert before.keys() == after.keys()
    moved = {name for name, (_, x) in after.items() if (x != before[name][1]).any()}
    should = {name for name, (kind, _) in after.items() if should_move(stage, name, kind)}
    assert moved == should, moved ^ should
    # Each player's adapters are on every linear layer, the generator's also on the stage's convolutions.
    parts = {"": end.model} if stage != "stage3_gan" else {"generator": end.model.generator, "score": end.model.score}
    for part, model in parts.items():
        names = {target.path: name for name, target in lora.adapters.targets(model).items()}
        adapted = {names[path].removeprefix("blocks.0.") for path, _ in lora.adapters.adapted(model)}
        linear = {t.path for t in lora.adapters.targets(model).values() if t.layout == "linear"}
        convolutions = set() if part == "score" else CONVOLUTIONS[stage]
        assert adapted == {names[path].removeprefix("blocks.0.") for path in linear} | convolutions
    assert any("discriminator" in name for name in moved) == (stage == "stage3_gan")


def test_metrics_count_noisy_and_history_tokens(trained):
    stage, folder, _, _ = trained
    *_, last = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    sample = 40 + 144 if stage.startswith("stage1") else 40 + 36 + 40 + 144  # of one level, or of two
    assert last["tokens_per_second"] / last["steps_per_second"] == pytest.approx(4 * sample)


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(trained, root):
    """Bit for bit: parameters of all players, optimisers, average, place in the data; so all was in the checkpoint."""
    stage, folder, _, end = trained
    newest = folder / "checkpoints" / "3"
    place = (newest / "data" / "metadata").read_bytes()
    shutil.rmtree(newest)
    restored, again = recipe.run(pytest.MonkeyPatch(), recipe.arguments(stage, root, folder, *EVERY_STEP))
    assert int(restored.step) == 2
    assert jax.tree.structure(again) == jax.tree.structure(end)
    for (path, a), b in zip(jax.tree.leaves_with_path(again), jax.tree.leaves(end), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert (newest / "data" / "metadata").read_bytes() == place


def test_the_export_holds_all_that_moved(trained):
    """The pipeline's transformer is the average with adapters merged, lora/ the adapters: both in bfloat16."""
    stage, folder, _, end = trained
    best = end.best.generator if stage == "stage3_gan" else end.best
    loaded = load_model(
        Transformer.abstract(recipe.SIZES, stacked=True), folder / "pipeline" / "transformer", dtype="model"
    )
    merged = values(lora.merge(jax.tree.map(jnp.asarray, best)))
    bare = values(lora.remove(best))
    found = values(loaded)
    assert found.keys() == merged.keys()
    for name, (_, x) in merged.items():
        kept = ("time_embedder", "scale_shift_table", "norm2")  # the files keep these in float32
        expected = x if any(part in name for part in kept) else np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(found[name][1], expected, err_msg=name)
    changed = {name for name, (_, x) in merged.items() if (x != bare[name][1]).any()}
    weights = {".".join(map(str, (*path, "weight"))) for path, _ in lora.adapters.adapted(best)}
    assert changed == weights

    files = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    names = {target.path: name for name, target in lora.adapters.targets(best).items()}
    expected = {}
    for path, module in lora.adapters.adapted(best):
        (adapter,) = module.adapters
        for part, variable in (("A", adapter.a), ("B", adapter.b)):
            x = np.asarray(variable.get_value())
            expected[f"transformer.{names[path]}.lora_{part}.weight"] = x[0] if path[0] == "blocks" else x
    assert files.keys() == expected.keys()
    for name, x in expected.items():
        *kernel, _, _ = range(x.ndim)
        x = x.transpose(*(x.ndim - 1, x.ndim - 2), *kernel)
        x = np.asarray(jnp.asarray(x, jnp.bfloat16))
        np.testing.assert_array_equal(files[name].reshape(x.shape), x, err_msg=name)


def test_defaults_of_lora_are_every_linear_layer():
    model = Transformer.abstract(recipe.SIZES, stacked=True)
    linear = {name for name, target in lora.adapters.targets(model).items() if target.layout == "linear"}
    chosen = lora.LoRAConfig(3, None, AdapterConfig().target_modules)
    made = jax.eval_shape(lambda: lora.add(recipe_model(), chosen, jax.random.key(0)))
    names = {target.path: name for name, target in lora.adapters.targets(made).items()}
    assert {names[path] for path, _ in lora.adapters.adapted(made)} == linear


def recipe_model() -> Transformer:
    return Transformer(recipe.SIZES, stacked=True, rngs=nnx.Rngs(0))
