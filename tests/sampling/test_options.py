"""Options are stated once: Python's arguments, the command line and YAML take the same names, types and defaults."""

import dataclasses
import inspect
import re

import numpy as np
import pytest
import yaml

from helios_jax import HeliosPipeline
from helios_jax.sampling import cli, run
from helios_jax.sampling.options import SampleConfig, SamplingOptions
from tests import tiny

NAMES = [f.name for f in dataclasses.fields(SamplingOptions)]
STEPS = "pyramid_num_inference_steps_list"
# A value of each kind of field, as a person types it.
TYPED = {STEPS: "2, 1,3", "history_sizes": "[4, 2,1]", "use_zero_init": "false", "fps": "8"}


@pytest.mark.parametrize("method", [HeliosPipeline.__call__, HeliosPipeline.stream])
def test_python_s_arguments_are_all_options_with_their_defaults_and_help(method):
    parameters = inspect.signature(method).parameters
    assert {name: parameters[name].default for name in NAMES} == dataclasses.asdict(SamplingOptions())
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    assert all(f"{f.name}: {f.metadata['help']}" in method.__doc__ for f in dataclasses.fields(SamplingOptions))


def test_sequences_may_be_lists_or_tuples():
    changed = SamplingOptions().changed({"history_sizes": [4, 2, 1], "pyramid_num_inference_steps_list": (1, 2)})
    assert changed == SamplingOptions(history_sizes=(4, 2, 1), pyramid_num_inference_steps_list=[1, 2])


def test_an_unknown_argument_is_one_line():
    with pytest.raises(TypeError, match="guidence_scale is no option of sampling; did you mean guidance_scale"):
        tiny.pipeline().stream("a red plus", guidence_scale=3.0)


def test_flags_are_all_fields_and_read_as_yaml_does(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text("prompt: a red plus\n")
    keys = yaml.safe_load("{pyramid_num_inference_steps_list: [2, 1, 3], history_sizes: [4, 2, 1]}")
    (tmp_path / "keys.yaml").write_text(
        yaml.safe_dump({"prompt": "a red plus", **keys, "use_zero_init": False, "fps": 8})
    )
    flags = [part for name, value in TYPED.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert cli.parse([str(tmp_path / "flags.yaml"), *flags])[0] == cli.parse([str(tmp_path / "keys.yaml")])[0]
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    shown = capsys.readouterr().out
    flags = [f"--{f.name.replace('_', '-')} " for f in dataclasses.fields(SampleConfig) if f.name not in cli.OTHERWISE]
    assert [flag for flag in flags if flag not in shown] == []


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"num_frames": 33.0}, ValueError, "num_frames must be a whole number or null, got 33.0"),
        ({"num_frames": "33"}, ValueError, "num_frames must be a whole number or null, got '33'"),
        ({"fps": None}, ValueError, "fps must be a whole number, got null"),
        ({"generator": None}, TypeError, "generator is no option of sampling; give seed"),
        ({"num_frame": 1}, TypeError, "num_frame is no option of sampling; did you mean num_frames?"),
    ],
)
def test_an_argument_of_another_type_is_refused_before_any_work(change, error, told):
    with pytest.raises(error, match=re.escape(told)):
        SamplingOptions().changed(change)


def test_numbers_of_numpy_are_numbers():
    made = SamplingOptions().changed({"num_frames": np.int64(9), "guidance_scale": np.float32(3), "fps": np.array(8)})
    assert (made.num_frames, made.guidance_scale, made.fps) == (9, 3.0, 8)
    assert {type(made.num_frames), type(made.fps)} == {int}


def test_a_video_is_planned_and_its_image_read_once(tmp_path, monkeypatch):
    seen = []
    folder = tiny.folder(tmp_path / "pipeline")
    for name in ("make_plan", "read_context"):
        function = getattr(run, name)
        monkeypatch.setattr(run, name, lambda *a, name=name, function=function: seen.append(name) or function(*a))
    config = SampleConfig(
        model=str(folder),
        prompt="a red plus",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=1,
        num_latent_frames_per_chunk=3,
        out=str(tmp_path / "x.npz"),
    )
    monkeypatch.setattr(HeliosPipeline, "plan", None)  # nothing is left to plan or to read
    monkeypatch.setattr(HeliosPipeline, "read_context", None)
    assert run.run(config) == 0
    assert seen == ["make_plan", "read_context"]
