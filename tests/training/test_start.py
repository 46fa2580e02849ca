"""The weights that a run starts from: configs that cannot be and sizes that differ are one line."""

import dataclasses
import json
import shutil

import jax
import pytest

from helios_jax.config import ConfigError
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.models.transformer import TransformerConfig
from helios_jax.sharding import AXES
from helios_jax.trained import Trained
from helios_jax.training import cli, start
from helios_jax.training.stage_table import load_config
from tests.training import recipe

WAN = {
    "_class_name": "WanTransformer3DModel",
    "attention_head_dim": 16,
    "cross_attn_norm": True,
    "ffn_dim": 48,
    "freq_dim": 32,
    "in_channels": 4,
    "num_attention_heads": 2,
    "num_layers": 1,
    "out_channels": 4,
    "patch_size": [1, 2, 2],
    "rope_max_seq_len": 1024,
    "text_dim": 16,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    recipe.build(folder)
    return folder


def refused(root, capsys, stage, *more):
    """The one line that a run of `stage` ends with."""
    assert cli.main(recipe.arguments(stage, root, root / "none", *more)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert not (root / "none" / "config.yaml").exists()
    return err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1000000}, "num_layers is 1000000: it must be at most 1000, 25 times the released"),
        ({"num_attention_heads": "two"}, "num_attention_heads is 'two': it must be a whole number"),
        ({"attention_head_dim": "16"}, "attention_head_dim is '16': it must be a whole number"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0: it must be positive"),
        ({"patch_size": 2}, "patch_size is 2: it must be a list"),
        ({"image_dim": 1280}, "is Wan's image-to-video model"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_config_of_wan_is_checked_as_ours_are(root, tmp_path, capsys, change, message):
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "config.json").write_text(json.dumps({**WAN, **change}))
    told = refused(root, capsys, "stage1_init", f"init={tmp_path / 'wan'}")
    assert f"init: {tmp_path / 'wan'}" in told
    assert message in told


def test_sizes_of_the_config_that_the_weights_have_not_blame_the_config(root, capsys):
    given = dataclasses.asdict(dataclasses.replace(recipe.SIZES, ffn_dim=64))
    given = {name: list(x) if isinstance(x, tuple) else x for name, x in given.items() if x is not None}
    told = refused(root, capsys, "stage1_post", f"model.transformer={json.dumps(given)}")
    assert "helios/transformer does not fit model.transformer of this run's config: " in told


def test_weights_that_are_not_their_config_s_blame_that(root, tmp_path, capsys):
    folder = tmp_path / "transformer"
    folder.symlink_to(root / "helios" / "transformer")
    moved = tmp_path / "helios"
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).symlink_to(path)
    values = json.loads((moved / "config.json").read_text())
    (moved / "config.json").unlink()
    (moved / "config.json").write_text(json.dumps({**values, "ffn_dim": 64}))
    assert "does not fit its config.json: " in refused(root, capsys, "stage1_post", f"init={moved}")


@pytest.mark.parametrize("stage", ["stage1_init", "stage3_post"])
def test_heads_that_context_does_not_divide_are_refused_before_weights_are_read(root, stage):
    path, *flags = recipe.arguments(stage, root, root / "none")
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    key = jax.random.key(0)
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(ConfigError, match=r"mesh: context=2 does not divide the 1 heads .*context_attention=ring"):
            start.init_transformer(load_config(path, flags), key)
        ring = load_config(path, [*flags, "mesh.context_attention=ring"])
        made = jax.eval_shape(lambda key: start.init_transformer(ring, key), key)
    assert made.implementations.context == "ring"


def test_the_loop_over_blocks_is_written_out_where_the_config_says_so(root):
    path, *flags = recipe.arguments("stage1_post", root, root / "none")
    for flag in (False, True):
        config = load_config(path, [*flags, f"unroll={str(flag).lower()}"])
        assert jax.eval_shape(lambda key, c=config: start.init_transformer(c, key), jax.random.key(0)).unroll is flag


def test_the_rule_names_the_released_size():
    assert TransformerConfig.num_layers * 25 == 1000


@pytest.mark.parametrize(
    ("stage", "key"), [("stage3_ode", "init"), ("stage3_post", "init"), ("stage3_post", "distill.score.init")]
)
def test_a_student_has_the_memory_of_the_weights_that_it_starts_from(root, tmp_path, capsys, stage, key):
    shutil.copytree(root / "helios", tmp_path / "helios")
    path = tmp_path / "helios" / "transformer" / "config.json"
    memory = MemoryConfig(anchor=None, positions="absolute")
    path.write_text(json.dumps(json.loads(path.read_text()) | Trained(memory).entries()))
    told = refused(root, capsys, stage, f"{key}={tmp_path}/helios")
    assert told == (
        f"train.py: {key}: {tmp_path}/helios was trained with flow.memory.anchor=None, not first, "
        "flow.memory.positions=absolute, not relative; set flow.memory as it was\n"
    )


def test_stages_1_and_2_adapt_weights_to_another_memory_and_say_so(root):
    path, *overrides = recipe.arguments("stage2_post", root, root / "none")
    config = load_config(path, overrides)
    config.flow.memory = MemoryConfig(long=8)
    with pytest.warns(UserWarning, match=r"flow.memory.long=16, not 8; the weights will be adapted to it"):
        start.check_init(config)
