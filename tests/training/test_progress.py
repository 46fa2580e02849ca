"""The help, the bar, the lines above it and the learning rate, as a person sees them."""

import io
import logging
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from rich.console import Console

import train
from helios_jax import config as configs
from helios_jax.config import ConfigError
from helios_jax.models.layers import Linear
from helios_jax.runtime.command import Lines
from helios_jax.training import cli, progress
from helios_jax.training.optim import EMAConfig, OptimConfig
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage_names import STAGES
from helios_jax.training.stage_table import load_config
from helios_jax.training.stages.distill.distill_config import CriticConfig, DistillConfig, DistillTrainConfig
from helios_jax.training.stages.distill.distill_stage import DistillStage
from tests.training import dummy
from tests.training.test_loop import BASE, run


def test_help_lists_the_stages_keys_and_codes(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert all(stage.about in told for stage in STAGES.values())
    defaults = configs.to_dict(TrainConfig(optim=OptimConfig(ema=EMAConfig())))
    for key, text in cli.KEYS.items():
        assert text in told
        value = defaults
        for part in key.split("."):
            value = value[part]
        if "[" in text:
            shown = "null" if value is None else str(value)
            assert text.endswith(f" [{shown}]"), (key, value)


def test_help_waits_for_no_jax():
    code = (
        "import sys, contextlib, io\n"
        "from helios_jax.training.cli import make_parser\n"
        "make_parser().format_help()\n"
        "print([name for name in ('jax', 'flax', 'orbax', 'tensorflow_datasets') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told.stdout == "[]\n"


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


@pytest.mark.parametrize("width", [30, 60, 80, 160])
def test_the_bar_shows_steps_and_time_left_at_any_width(width):
    console = terminal(width)
    bar = progress.make_bar(console)
    long = "  ".join(f"loss_level_{i} 0.1234" for i in range(20))
    bar.add_task(f"0.53 steps/s  loss 0.1234  lr 5e-05  {long}", total=1000, completed=12, left="31:05:11 left")
    console.print(bar.get_renderable())
    (shown,) = console.file.getvalue().rstrip("\n").split("\n")
    assert len(shown) <= width
    assert "12/1000" in shown
    assert "31:05:11 left" in shown
    assert width < 80 or "loss 0.1234" in shown


def test_lines_come_above_the_bar(capsys):
    console, logger = terminal(80), logging.getLogger("absl")
    handler = Lines("train.py")  # made before the bar
    logger.addHandler(handler)
    try:
        with progress.make_bar(console) as bar, warnings.catch_warnings():
            bar.add_task("x", total=3, left="")
            warnings.simplefilter("always")
            logger.warning("a line of a logger")
            print("a line on stderr", file=sys.stderr)
            print("a line on stdout")
        for line in ("train.py: a line of a logger", "a line on stderr", "a line on stdout"):
            assert f"{line}\n" in console.file.getvalue()
    finally:
        logger.removeHandler(handler)
    assert "line" not in "".join(capsys.readouterr())


def test_a_warning_is_one_line_with_the_program_s_name(tmp_path, capsys, monkeypatch):
    made = dummy.Dummy.batches

    def batches(self, mesh):
        warnings.warn("the data are old", stacklevel=2)
        logging.getLogger("helios_jax.models").info("attention: xla")
        return made(self, mesh)

    monkeypatch.setattr(dummy.Dummy, "batches", batches)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**BASE, "steps": 1}))
    assert run(tmp_path / "c.yaml", f"run={tmp_path / 'r'}") == 0
    out, err = capsys.readouterr()
    assert err == "train.py: warning: the data are old\ntrain.py: attention: xla\n"
    assert "\ncompiling the first step\nstep 1/1  loss " in out
    assert run(tmp_path / "c.yaml", f"run={tmp_path / 'r'}") == 0
    assert "compiling" not in capsys.readouterr().out


def test_the_learning_rates_of_stage_3_are_its_players():
    """Adam moves by the learning rate where the gradient is constant."""

    class Two(nnx.Module):
        def __init__(self):
            self.generator = Linear(1, 1, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
            self.score = Linear(1, 1, axes=("embed", "mlp"), rngs=nnx.Rngs(0))

    optim = {"weight_decay": 0.0, "clip_norm": None}
    config = DistillTrainConfig(
        steps=9,
        optim=OptimConfig(lr=1e-2, schedule="cosine", warmup_steps=2, **optim),
        distill=DistillConfig(critic=CriticConfig(optim=OptimConfig(lr=5e-2, **optim), steps_per_generator=2)),
    )
    stage = DistillStage(config)
    optimizer, params = stage.make_optimizer(), nnx.state(Two())
    state, shown = optimizer.init(params), 0.0
    ones = jax.tree.map(jnp.ones_like, params)
    for step in range(config.steps):
        changes, state = optimizer.update(ones, state, params)
        moved = -float(np.asarray(changes["generator"]["bias"][...])[0])
        if step % 2 == 0:
            shown = stage.learning_rates(step)
            assert moved == pytest.approx(shown["lr"], rel=1e-4)
        else:
            assert moved == 0
            assert stage.learning_rates(step) == shown
        moved = -float(np.asarray(changes["score"]["bias"][...])[0])
        assert moved == pytest.approx(shown["lr_critic"], rel=1e-4) == pytest.approx(5e-2)


@pytest.mark.parametrize("seed", ["-1", str(2**64)])
def test_a_seed_of_the_data_out_of_range_is_refused(tmp_path, seed):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match=r"data\.seed must be from 0 to 2\^64 - 1"):
        load_config(tmp_path / "c.yaml", [f"data.seed={seed}"])
    assert load_config(tmp_path / "c.yaml", [f"data.seed={2**64 - 1}"]).data.seed == 2**64 - 1
