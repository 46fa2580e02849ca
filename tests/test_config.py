"""Reading configs: what merges, and that everything wrong fails in one line that names its place."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import pytest

from helios_jax import config
from helios_jax.config import ConfigError, load
from helios_jax.config_types import describe, misfit, misfit_at
from helios_jax.sampling import cli
from helios_jax.sampling.options import SampleConfig
from helios_jax.training.stage_names import STAGES
from helios_jax.training.stage_table import find_stage, load_config


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
        ("lr=fast", ["lr must be a number, got 'fast'"]),
        ("net.width=0", ["override 'net.width=0'", "net.width must be at least 1, got 0"]),
        ("extra.width=0", ["'extra.width=0': extra.width must be at least 1"]),
        ("net.width=2.5", ["net.width must be a whole number, got 2.5"]),
        ("net.sizes=[1,a]", ["net.sizes must be a list of whole numbers, got [1, 'a']"]),
        ("net.patches=[[1,2]]", ["net.patches must be a list of lists of 3 whole numbers, got [[1, 2]]"]),
        ("net.kind=c", ["net.kind must be one of a, b, got 'c'"]),
        ("net=null", ["net must be a group of keys (width, sizes, patches, kind), got null"]),
        ("extra=3", ["extra must be a group of keys (width, sizes, patches, kind) or null, got 3"]),
        ("lr.x=3", ["lr must be a number, got {'x': 3}"]),
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
        ("net: {width: -1}", ["c.yaml: net.width must be at least 1, got -1"]),
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
        ("optim.lr=-1", "optim.lr must be above 0"),
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


def fields(schema: Any, prefix: str = ""):
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}", hint
        for kind in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(kind) and not str(hint).startswith("list"):
                yield from fields(kind, f"{prefix}{name}.")


INTERNAL = re.compile(
    r"helios_jax|typing|Optional|Literal|Config\b|\bint\b|\bfloat\b|\bstr\b|\bbool\b|tuple|None|DictConfig"
)


@pytest.mark.parametrize("schema", [SampleConfig, *(find_stage(name).Config for name in STAGES)])
def test_a_wrong_value_of_any_field_is_told_in_plain_english(schema):
    for key, hint in fields(schema):
        for value in ([[[1]]], {"x": 1}, "wrong!"):
            if value != "wrong!" or str not in (hint, *get_args(hint)):
                line = misfit_at(schema, key, value)
                assert line is not None, key
                assert line.startswith(key)
                assert not INTERNAL.search(line), line
                assert "\n" not in line


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int | None, "a whole number or null"),
        (tuple[float, float], "a list of 2 numbers"),
        (tuple[bool, ...], "a list of values true or false"),
        (list[str] | None, "a list of texts or null"),
        (Literal["a", "b"] | None, "one of a, b or null"),
        (list[Net], "a list of groups of keys (width, sizes, patches, kind)"),
        (tuple[tuple[int, int], ...], "a list of lists of 2 whole numbers"),
    ],
)
def test_types_in_plain_english(hint, text):
    assert describe(hint) == text


@pytest.mark.parametrize(
    ("hint", "value"),
    [(int, "7"), (float, "1e-3"), (float, 7), (bool, "off"), (str, 7), (int | None, None), (tuple[int, ...], ["1", 2])],
)
def test_what_fits(hint, value):
    assert misfit(hint, value, "x") is None


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (int, "9" * 5000),
        (float, "nan"),
        (float, "1e400"),
        (float, "1" + "0" * 400),
        (bool, 2),
        (int, None),
    ],
)
def test_what_does_not_fit(hint, value):
    message = misfit(hint, value, "x")
    assert message is not None
    assert len(message) < 160


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--num-frames", "0"], "--num-frames must be at least 1, got 0"),
        (["--lora"], "argument --lora: expected one argument; --help lists all flags"),
        (["--frames", "a\nb"], "unrecognized arguments: --frames a b; --help lists all flags"),
        (["--fps", "fast"], "--fps must be a whole number, got 'fast'"),
        (["--precision", "half"], "--precision must be one of float32, bfloat16 or null, got 'half'"),
        (["--history-sizes", "1,a"], "--history-sizes must be a list of whole numbers or null, got ['1', 'a']"),
        (["--then", "x", "a"], "--then: chunk must be a whole number or null, got 'x'"),
        (["--then", "0", "a"], "--then: chunk must be at least 1, got 0"),
        (["--then", "infs", "a"], "--then: seconds must be a number or null, got 'inf'"),
        (["--then", "nans", "a"], "--then: seconds must be a number or null, got 'nan'"),
        (["--then", "1e400s", "a"], "--then: seconds must be a number or null, got '1e400'"),
        (["--image", "a", "--video", "b"], "--image and video were both given: a video begins with the one or"),
        (["switches=[{chunk: 3, promt: a}]"], "switches[0].promt: no such key; did you mean prompt?"),
        (["image_noise_sigma_max=2"], "override 'image_noise_sigma_max=2': image_noise_sigma_min must be from 0"),
        (["prompt=a\udcff"], "cannot read the value: unacceptable character"),
        (["--prompt", "a\udcff"], "--prompt must be UTF-8, got the byte or half character '\\udcff'; write it anew"),
        (["out=a\0b"], "cannot read the value"),
        (['out="a\\0b"'], "out must not hold a NUL character; leave it out"),
        (["--prompt", "a\0b"], "--prompt must not hold a NUL character; leave it out"),
        (["seed=" + "[" * 100_000], "is nested more than 50 deep; close the brackets"),
        (["a." * 10_000 + "b=1"], "is nested more than 50 deep; name a key of the config"),
        (["seed=[" + "1," * 20_000 + "]"], "holds more than 10000 values"),
        (["seed=" + "9" * 5000], "cannot read the value: Exceeds the limit"),
    ],
)
def test_bad_arguments_are_one_line(arguments, line, capsys):
    assert cli.main(["toy/sample", *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert len(error) < 400


def test_no_config_is_one_line(capsys):
    assert cli.main([]) == 2
    error = capsys.readouterr().err
    assert error == "sample.py: name a config, such as configs/toy/sample.yaml; --help lists all flags\n"


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"lr: " + b"[" * 100_000, "is nested more than 50 deep"),
        (b"lr: " + b'{"a":' * 100_000, "is nested more than 50 deep"),
        (b"- " * 100_000, "is nested more than 50 deep"),
        (BOMB.encode(), "holds more than 10000 values, with its aliases written out"),
        (b"# " + b"x" * 1_100_000, "is larger than 1 MB"),
        (b"lr: \xff", "not valid YAML"),
        (b"lr: \0", "not valid YAML"),
        (b"lr: *nowhere", "not valid YAML"),
        (b"true", "must hold `key: value` pairs"),
        (b"7", "must hold `key: value` pairs"),
    ],
)
def test_files_past_the_bounds_are_one_line(tmp_path, data, line):
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as e:
        load(path, [], Run)
    assert str(e.value).startswith(f"{path}: ")
    assert line in str(e.value)
    assert "\n" not in str(e.value)


def test_aliases_within_bounds_are_read(tmp_path):
    path = write(tmp_path, "c.yaml", "net: &n {width: 3}\nextra: *n\n")
    assert load(path, [], Run).extra == Net(3)


def test_a_name_that_no_file_can_have_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be opened"):
        load("x" * 300 + ".yaml", [], Run)
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path, [], Run)
