"""Reading configs: what merges, and that everything wrong fails in one line that names its place."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from helios_jax import config
from helios_jax.config import ConfigError, load
from helios_jax.training.stage_table import load_config


@dataclass(unsafe_hash=True)
class Net:
    width: int = 8
    sizes: tuple[int, ...] = (1, 2)
    patches: tuple[tuple[int, int, int], ...] = ((1, 2, 2),)
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


@dataclass
class Run:
    lr: float = 1e-3
    net: Net = field(default_factory=Net)
    extra: Net | None = None


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_bases_then_file_then_overrides(tmp_path):
    write(tmp_path, "a.yaml", "lr: 5e-5\nnet: {width: 2, sizes: [3]}\n")
    write(tmp_path, "sub/b.yaml", "base: ../a.yaml\nnet: {width: 3}\n")
    path = write(tmp_path, "c.yaml", "base: sub/b.yaml\nextra: {}\n")
    got = load(path, ["net.patches=[[1,4,4],[2,8,8]]", "extra.width=7"], Run)
    assert got == Run(5e-5, Net(3, (3,), ((1, 4, 4), (2, 8, 8))), Net(7))
    assert load(path, ["extra=null"], Run).extra is None
    hash(got.net)


def test_saved_config_reads_back_equal(tmp_path):
    path = write(tmp_path, "c.yaml", "steps: 7\noptim: {ema: {decay: 0.9}, betas: [0.5, 0.9]}\n")
    got = load_config(path, ["stage=vae"])
    assert got.optim.betas == (0.5, 0.9)
    config.save(got, tmp_path / "out" / "config.yaml")
    assert load_config(tmp_path / "out" / "config.yaml") == got


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("net.widht=3", ["override 'net.widht=3'", "net.widht", "no such key", "did you mean width?"]),
        ("nets.width=3", ["nets", "no such key", "net"]),
        ("lr=fast", ["lr", "must be float", "'fast'"]),
        ("net.width=0", ["override 'net.width=0'", "net.width: width must be at least 1, got 0"]),
        ("extra.width=0", ["extra.width", "at least 1"]),
        ("net.width=2.5", ["net.width", "must be int", "2.5"]),
        ("net.sizes=[1,a]", ["net.sizes", "tuple[int, ...]"]),
        ("net.patches=[[1,2]]", ["net.patches"]),
        ("net.kind=c", ["net.kind", "'a', 'b'"]),
        ("net=null", ["net", "must be Net"]),
        ("extra=3", ["extra", "Net | null"]),
        ("lr.x=3", ["lr"]),
        ("lr", ["key=value"]),
        ("--lr=3", ["key=value"]),
        ("lr=[3", ["cannot read"]),
    ],
)
def test_bad_override_is_one_clear_line(tmp_path, override, parts):
    path = write(tmp_path, "c.yaml", "lr: 1\n")
    with pytest.raises(ConfigError) as e:
        load(path, [override], Run)
    assert "\n" not in str(e.value)
    for part in parts:
        assert part in str(e.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr: [", ["c.yaml", "not valid YAML"]),
        ("- 1", ["key: value"]),
        ("base: nowhere.yaml", ["nowhere.yaml", "no such file", "base of"]),
        ("base: c.yaml", ["comes back to itself"]),
        ("base: [a]", ["base"]),
        ("net: {width: -1}", ["c.yaml: net.width", "at least 1"]),
        ("lr: ${nowhere}", ["lr"]),
    ],
)
def test_bad_file_is_one_clear_line(tmp_path, text, parts):
    path = write(tmp_path, "c.yaml", text)
    with pytest.raises(ConfigError) as e:
        load(path, [], Run)
    assert "\n" not in str(e.value)
    for part in parts:
        assert part in str(e.value)


def test_missing_file_suggests_a_neighbour(tmp_path):
    write(tmp_path, "stage1.yaml", "lr: 1\n")
    with pytest.raises(ConfigError, match=r"no such file; did you mean stage1\.yaml\?"):
        load(tmp_path / "stage2.yaml", [], Run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage=va", "did you mean vae"),
        ("stage=os.nothing", "stage: os.nothing cannot be imported, give the dotted path of a class"),
        ("stage=os.getcwd", "stage: os.getcwd must be a subclass of helios_jax.training.stage.Stage"),
        ("stage=null", "stage: must be a name, as in flow, got None"),
        ("steps=0", "steps must be at least 1"),
        ("optim.lr=-1", "optim.lr: lr must be above 0"),
        ("optim.betas=[0.9,1.0]", "betas"),
        ("optim.ema.decay=1.5", "optim.ema.decay"),
        ("optim.name=sgd", "optim.name"),
        ("optim.name=adam optim.weight_decay=1e-4", "weight_decay must be null for adam, which has no such option"),
        ("optim.name=lion optim.eps=1e-6", "eps must be null for lion"),
        ("optim.name=prodigy optim.lr=1 optim.decayed=matrices", "decayed must be all for prodigy"),
        ("optim.name=prodigy", "lr must be 0.1 or more for prodigy"),
        ("data.frames=10", "try 9, 17 or 33"),
        ("mesh.fsdp=null", "only one axis"),
        ("precision=float16", "precision"),
    ],
)
def test_train_config_ranges(tmp_path, override, message):
    path = write(tmp_path, "c.yaml", "stage: vae\n")
    with pytest.raises(ConfigError) as e:
        load_config(path, override.split())
    assert message in str(e.value)
