"""The planner's command: one page, exit codes, and refusals in one line."""

import jax
import pytest

from helios_jax.planner import command
from helios_jax.planner.command import main
from helios_jax.planner.program import open_config
from helios_jax.training.stages.distill.players import score_sizes


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return code, *capsys.readouterr()


def test_a_page_tells_what_fits(capsys):
    code, out, err = run(capsys, "configs/stage1_init.yaml", "--topology", "v5p-128", "--quick")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) < 50
    assert max(map(len, out.splitlines())) < 220
    for part in (
        "FITS:",
        "frozen parameters",
        "optimiser state",
        "all-reduce",
        "MFU",
        "tokens/s",
        "settings were estimated",
    ):
        assert part in out
    assert "nothing was compiled" in out


@pytest.mark.parametrize("mesh", ["mesh.fsdp=64", "mesh={data: 1, fsdp: 64}", "mesh={fsdp: 64}"])
@pytest.mark.parametrize("accumulate", ["optim.accumulate=4", "optim={accumulate: 4}"])
def test_a_given_mesh_is_planned_as_it_is(capsys, mesh, accumulate):
    arguments = ("configs/stage1_init.yaml", "--topology", "v5p-128", "--quick", mesh, accumulate)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "settings: mesh.data=1 mesh.fsdp=64 optim.accumulate=4 remat=products" in out
    assert "settings were estimated" not in out


@pytest.mark.parametrize("accumulate", ["optim.accumulate=2", "optim={accumulate: 2}"])
def test_a_given_setting_stays_in_the_search(capsys, accumulate):
    arguments = ("configs/stage1_init.yaml", "--topology", "v5p-128", "--quick", accumulate, "remat=block")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    settings = [line for line in out.splitlines() if " mesh." in line]
    assert len(settings) > 2
    assert all(line.endswith("optim.accumulate=2 remat=block") for line in settings)


@pytest.mark.parametrize("name", ["toy", "scenes"])
def test_scores_have_the_sizes_of_the_config_where_their_weights_are_not_here(name):
    config = open_config(f"configs/{name}/stage3_distill.yaml", [])
    assert score_sizes(config) == config.model.transformer


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["toy", "scenes"])
def test_scores_of_other_sizes_than_the_released_are_planned(capsys, name):
    code, out, err = run(capsys, f"configs/{name}/stage3_distill.yaml", "--topology", "H100", "--quick")
    assert (code, err) == (0, "")
    assert "FITS" in out


def test_what_does_not_fit_ends_with_1_and_a_remedy(capsys):
    arguments = ("configs/stage1_init.yaml", "--topology", "v5p-128", "--quick", "mesh.fsdp=16", "remat=null")
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert "DOES NOT FIT" in out
    assert err.count("\n") == 1
    assert "these settings should fit: mesh." in err
    code, _, err = run(capsys, "configs/stage1_init.yaml", "--topology", "H100", "--quick", "data.batch_size=8")
    if code:  # one GPU holds weights and optimiser state, and little else
        assert "GB of each chip are missing" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("stage1_init", "--topology", "v9-64"), "no machine of that name"),
        (("stage1_init",), "--topology"),
        (("stage1_ini", "--topology", "v6e-256"), "no such file"),
        (("stage1_init", "--topology", "v6e-256", "optim.speed=1"), "speed"),
        (("toy/vae", "--topology", "v6e-256"), "no transformer"),
        (("stage1_init", "--topology", "v6e-64", "mesh.fsdp=24"), "does not fit 64 devices"),
        (("stage1_init", "--topology", "v6e-256", "mesh.fsdp=16"), "does not divide"),
        (("stage1_init", "--topology", "v6e-256", "data.batch_size=100"), "does not divide"),
        (("stage1_init", "--topology", "v6e-256", "--compile", "0"), "1 up"),
        (("stage1_init", "--topology", "0*v5p-128", "--quick"), "has 0 chips"),
        (("stage1_init", "--topology", "v5p-128", "optim.accumulate=256"), "nearest that does is optim.accumulate=32"),
    ],
)
def test_refusals(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def test_a_kernel_that_is_too_large_for_a_chip_is_told_in_one_line(capsys, monkeypatch):
    """Less memory in the step's arrays would not help, so it is no answer that the step does not fit."""

    def refuse(*_, **__):
        text = (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for %splash_dkv.1 ="
        )
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(command.search, "real_mesh", lambda *_: None)
    monkeypatch.setattr(command, "arguments", lambda *_: {})
    monkeypatch.setattr(command.program, "compiled", refuse)
    code, _, err = run(capsys, "configs/stage1_init.yaml", "--topology", "v5p-128", "mesh.fsdp=16")
    assert code == 2
    assert err.count("\n") == 1
    assert "splash_dkv: its blocks need more on-chip memory than a TPU v5p has" in err


def test_an_absent_compiler_is_told_with_a_remedy(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, "stage1_init", "--topology", "v6e-256")
    assert code == 2
    assert err.count("\n") == 1
    assert "libtpu" in err
    assert "--quick" in err
