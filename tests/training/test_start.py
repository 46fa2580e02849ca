"""The weights that a run starts from: configs that cannot be and sizes that differ are one line."""

import dataclasses
import json
import shutil

import jax
import pytest

from helios_jax.config import ConfigError
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.models.transformer import TransformerConfig
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sharding import AXES
from helios_jax.trained import Levels, Trained
from helios_jax.training import cli, lineage, start
from helios_jax.training.run_config import ValidationConfig
from helios_jax.training.stage_table import load_config
from helios_jax.training.stages.distill.distill_stage import check_players
from helios_jax.training.validation import check_validation
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
    path.write_text(json.dumps(json.loads(path.read_text()) | Trained(memory, kind="base").entries()))
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
        lineage.check_init(config)


HALVES = Levels((0, 0.5, 1), 1 / 3)  # of the recipe's pyramid
THIRDS = Levels((0, 1 / 3, 2 / 3, 1), 1 / 3)
OTHER_RANGE = r"flow.pyramid.stage_range=\[0.0, 0.5, 1.0\], not \[0.0, 0.33333, 0.66667, 1.0\]"


def trained_before(root, tmp_path, record):
    """A folder with the weights of `root`/helios, as trained with `record`."""
    shutil.copytree(root / "helios", tmp_path / "before", dirs_exist_ok=True)
    path = tmp_path / "before" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | record.entries()))
    return tmp_path / "before"


def config_of(stage, root, folder):
    path, *flags = recipe.arguments(stage, root, root / "none", f"init={folder}")
    return load_config(path, flags)


@pytest.mark.parametrize("stage", ["stage3_ode", "stage3_post"])
def test_a_student_has_the_levels_of_the_weights_that_it_starts_from(root, tmp_path, capsys, stage):
    folder = trained_before(root, tmp_path, Trained(kind="mid", levels=Levels((0, 0.4, 1), 0.2)))
    assert refused(root, capsys, stage, f"init={folder}") == (
        f"train.py: init: {folder} was trained with flow.pyramid.stage_range=[0.0, 0.4, 1.0], not [0.0, 0.5, 1.0], "
        "flow.pyramid.gamma=0.2, not 0.33333; set the same here, or start from other weights\n"
    )


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (Trained(kind="mid", levels=HALVES), OTHER_RANGE),
        (Trained(steps=(2, 2, 2), levels=THIRDS), r"trained with distill.steps=\[2, 2, 2\], not \[1, 1, 1\]; set the"),
        (Trained(steps=(2, 2, 2)), r"trained with distill.steps=\[2, 2, 2\], not \[1, 1, 1\]"),  # of an older run
        (Trained(kind="base"), "trained as Base, without levels; start a student from a Mid model"),
        (Trained(kind="mid", levels=THIRDS), None),
        (Trained(steps=(1, 1, 1), levels=THIRDS), None),
        (Trained(), None),
    ],
)
def test_the_toy_s_student_starts_from_three_levels(root, tmp_path, record, rule):
    folder = trained_before(root, tmp_path, record)
    flags = [f"init={folder}", "distill.score.init=helios_jax/assets/toy"]
    config = load_config("configs/toy/stage3_distill.yaml", flags)
    if rule is None:
        check_players(config)
        return
    with pytest.raises(ConfigError, match=rule) as caught:
        check_players(config)
    assert "\n" not in str(caught.value)


def test_levels_that_a_run_left_out_are_told_wherever_they_would_be_sampled(root, tmp_path):
    run = load_config("configs/scenes/stage2_init.yaml", [])
    assert lineage.trained(run).left_out == (1, 2)
    assert lineage.trained(load_config("configs/scenes/stage2_post.yaml", [])).left_out == ()
    folder = trained_before(root, tmp_path, Trained(left_out=(1,)))
    with pytest.warns(UserWarning, match=r"init: .*before: training left out the levels \[1\]"):
        lineage.check_init(config_of("stage3_ode", root, folder))
    mid = tmp_path / "mid"
    shutil.copytree("helios_jax/assets/toy_mid", mid)
    path = mid / "transformer" / "config.json"
    values = json.loads(path.read_text())
    values["_trained"]["left_out"] = [1, 2]
    path.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"mid/transformer: training left out the levels \[1, 2\]"):
        checkpoint = Checkpoint.open(mid)
    with pytest.warns(UserWarning, match=r"a.safetensors: training left out the levels \[2\]"):
        checkpoint.with_loras({"a.safetensors": Trained(left_out=(2,)).metadata()})
    run.validation = ValidationConfig(prompts=("x",), height=128, width=128)
    with pytest.warns(UserWarning, match=r"validation: training left out the levels \[1, 2\]"):
        check_validation(run)


def test_base_with_the_adapters_of_later_stages_is_a_student_s_start(root, tmp_path):
    config = config_of("stage3_post", root, trained_before(root, tmp_path, Trained(kind="base")))
    for known in (Trained(kind="mid", levels=HALVES), Trained(MemoryConfig(), (1, 1)), Trained()):
        lineage.check_levels(config, {"a": known.metadata(), "b": {}})
    with pytest.raises(
        ConfigError, match=r"init: .* with its adapters was trained with flow.pyramid.stage_range=\[0.0, 0"
    ):
        lineage.check_levels(config, {"a": Trained(kind="mid", levels=THIRDS).metadata()})
    with pytest.raises(ConfigError, match=r"with distill.steps=\[2, 2\], not \[1, 1\]"):
        lineage.check_levels(config, {"a": Trained(steps=(2, 2), levels=HALVES).metadata()})


@pytest.mark.parametrize(
    ("stage", "record", "told"),
    [
        ("stage1_post", Trained(kind="base"), None),
        ("stage1_post", Trained(kind="mid", levels=HALVES), "as Mid (pyramid), not Base; the weights will be adapted"),
        ("stage2_post", Trained(kind="base"), None),
        ("stage2_post", Trained(kind="mid", levels=HALVES), None),
        ("stage2_post", Trained(kind="mid", levels=THIRDS), "=[0.0, 0.33333, 0.66667, 1.0], not [0.0, 0.5, 1.0]; the"),
        ("stage2_post", Trained(steps=(1, 1), levels=HALVES), "as Distilled, not Mid (pyramid); the weights will be"),
    ],
)  # fmt: skip
def test_stages_1_and_2_adapt_weights_of_a_later_kind_or_other_levels(root, tmp_path, recwarn, stage, record, told):
    lineage.check_init(config_of(stage, root, trained_before(root, tmp_path, record)))
    assert [told in str(one.message) for one in recwarn.list] == ([] if told is None else [True])
