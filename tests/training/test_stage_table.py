"""The table of stages: each config is read in its own stage's schema, and a user's class is a stage too."""

import importlib
import inspect
import pkgutil

import pytest
import yaml

from helios_jax.config import ConfigError
from helios_jax.config_files import read_override
from helios_jax.training import stages
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage import Stage
from helios_jax.training.stage_names import STAGES
from helios_jax.training.stage_table import find_stage, load_config, make_stage
from tests.training.dummy import Dummy


class Half(Stage[TrainConfig, Dummy]):
    """A stage that lacks methods."""

    def batches(self, mesh):
        return iter(())


def subclasses(kind: type) -> set[type]:
    return {kind} | {found for child in kind.__subclasses__() for found in subclasses(child)}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "base.yaml").write_text("stage: vae\nsteps: 3\n")
    (tmp_path / "c.yaml").write_text("base: base.yaml\nsteps: 4\n")
    return tmp_path / "c.yaml"


def test_the_table_has_every_stage_of_the_project():
    for module in pkgutil.walk_packages(stages.__path__, f"{stages.__name__}."):
        importlib.import_module(module.name)
    ours = {kind for kind in subclasses(Stage) if kind.__module__.startswith(f"{stages.__name__}.")}
    assert set(map(find_stage, STAGES)) == {kind for kind in ours if not inspect.isabstract(kind)}


@pytest.mark.parametrize("name", STAGES)
def test_the_stage_decides_the_schema(path, name):
    """From the base, the file or the overrides, the last one."""
    assert isinstance(load_config(path), find_stage("vae").Config)
    config = load_config(path, [f"stage={name}"])
    assert type(config) is find_stage(name).Config
    assert (config.stage, config.steps) == (name, 4)
    stage = make_stage(config)
    assert type(stage) is find_stage(name)
    assert stage.config is config
    if name != "flow":  # the stage of a config that names none
        assert find_stage(name).Config.stage == name


def test_a_config_of_sampling_is_refused_by_its_name(path):
    path.write_text("prompt: a red plus\n")
    with pytest.raises(ConfigError, match=f"{path}: prompt: is of sampling; run python sample.py {path}"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "override", "key", "others"),
    [
        ("vae", "flow.text_drop=0.1", "flow", "flow and ode and distill do"),
        ("vae", "lora.rank=4", "lora", "flow and ode and distill do"),
        ("flow", "data.crop=32", "data.crop", "vae does"),
        ("flow", "distill.steps=[1,1]", "distill", "ode and distill do"),
        ("ode", "distill.gan.start=1", "distill.gan", "distill does"),
        ("ode", "flow.pyramid.sample_ratios=[1,1,1]", "flow.pyramid.sample_ratios", "flow does"),
        ("ode", "flow.text_drop=0.3", "flow.text_drop", "flow and distill do"),
        ("ode", "flow={drop: {t2v: 0.9}, times: {shift: linear}}", "flow.drop, flow.times", "flow does"),
        ("distill", "flow.times.shift=linear", "flow.times", "flow does"),
        ("distill", "flow.pyramid.levels=separate", "flow.pyramid.levels", "flow and ode do"),
        ("distill", "distill.ode_weight=3", "distill.ode_weight", "ode does"),
    ],
)
def test_a_key_of_another_stage_is_refused(path, name, override, key, others):
    """An ablation of it would silently be the row without."""
    it = "them" if "," in key else "it"
    rule = f"{key}: the stage {name} does not read {it}, only {others}; leave {it} out"
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"stage={name}", override])
    assert str(error.value) == f"override {override!r}: {rule}"
    path.write_text(yaml.safe_dump({"stage": name, **read_override(override)}))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {rule}"
    path.with_name("run.yaml").write_text("base: c.yaml\n")
    with pytest.raises(ConfigError) as error:
        load_config(path.with_name("run.yaml"))
    assert str(error.value) == f"{path}: {rule}, or give {path.with_name('run.yaml')} another base"


def test_a_key_of_no_stage_is_refused(path):
    with pytest.raises(
        ConfigError, match=r"'distill\.scores\.init=x'\: distill\.scores: no such key; did you mean score\?"
    ):
        load_config(path, ["stage=distill", "distill.scores.init=x"])


@pytest.mark.parametrize("name", ["ode", "distill"])
def test_a_student_has_steps_at_each_level(path, name):
    with pytest.raises(ConfigError, match=r"distill\.steps \[1, 1\] are of 2 levels, flow\.pyramid\.stage_range of 3"):
        load_config(path, [f"stage={name}", "distill.steps=[1,1]"])


@pytest.mark.parametrize(
    "change",
    [
        "{noise: 0, blur: null, saturation: null}",
        "{noise: 0, blur: {probability: 0}, saturation: {clean: 1}}",
        "{clean: 1, saturation: null}",
    ],
)
def test_corruption_that_changes_nothing_is_refused(path, change):
    """An ablation of it would silently be the row without."""
    with pytest.raises(ConfigError, match="corruption: without noise, blur and saturation it changes nothing"):
        load_config(path, ["stage=flow", f"flow.corruption={change}"])


@pytest.mark.parametrize("change", ["{noise: 0, saturation: null}", "{noise: 0, blur: null}", "{blur: null}"])
def test_each_part_of_the_corruption_alone(path, change):
    load_config(path, ["stage=flow", f"flow.corruption={change}"])


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("trainable=['(?i)x']", "is no regular expression"),
        ("trainable=['(']", r"trainable: '\(' is no regular expression \(missing"),
        ("lora.alpha=0", "alpha must be a positive number, or null for the rank, got 0"),
        ("distill.critic.lora.alpha=-1", "alpha must be a positive number"),
        ("validation={prompts: [a], seed: -1}", "seed must be from 0 to"),
        ("model.transformer.num_attention_heads=0", "num_attention_heads is 0: it must be at least 1"),
        ("model.transformer.patch_size=[0,2,2]", r"patch_size \(0, 2, 2\) must be three numbers"),
        ("model.transformer.ffn_dim=-1", "ffn_dim is -1: it must be at least 1"),
    ],
)
def test_values_that_cannot_be_are_refused_with_the_config(path, override, rule):
    with pytest.raises(ConfigError, match=rule) as error:
        load_config(path, ["stage=distill", override])
    assert "\n" not in str(error.value)


def test_a_user_s_stage_is_named_by_its_path(path):
    config = load_config(path, ["stage=tests.training.dummy.Dummy"])
    assert type(config) is TrainConfig
    assert type(make_stage(config)) is Dummy


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("floww", r"must be one of vae, flow, ode, distill, .* got 'floww'; did you mean flow\?"),
        ("tests.training.dummy.Dumy", r"tests\.training\.dummy\.Dumy cannot be imported"),
        ("nowhere.Dummy", r"nowhere\.Dummy cannot be imported, .* No module named 'nowhere'"),
        ("tests.training.dummy", r"tests\.training\.dummy must be a subclass of helios_jax\.training\.stage\.Stage"),
        ("tests.training.dummy.Net", r"Net must be a subclass of"),
        (f"{__name__}.Half", r"Half must have all methods of a stage; add init, loss \(or players\)"),
    ],
)
def test_what_is_no_stage_is_one_line(path, name, rule):
    with pytest.raises(ConfigError, match=rule):
        find_stage(name)
    with pytest.raises(ConfigError, match=rule) as error:
        load_config(path, [f"stage={name}"])
    assert str(error.value).startswith(f"override 'stage={name}': stage: ")
    assert "\n" not in str(error.value)


def test_a_stage_that_loads_no_weights_says_so():
    with pytest.raises(ConfigError, match="begins with random weights only; set init to null"):
        Dummy(TrainConfig(stage="dummy")).load(None)
