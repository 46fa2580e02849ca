"""Shape annotations are checked in every test; hypothesis does not time them, machines differ.

Laws, kernels as they are interpreted, and whole pipelines are tested on programs that are compiled fast, at a third of
the time; values of networks beside a reference's, on optimized programs. With JAX_DISABLE_MOST_OPTIMIZATIONS=0, as for
`make parity`, everything is compiled as it is for use.
"""

import gc
import importlib.metadata
import os
import shutil
import tempfile

# Before jax, which reads its settings once. Workers and the tests' other processes inherit them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    # What one test has compiled, others and their processes read, in this run alone.
    COMPILED = tempfile.TemporaryDirectory()
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # XLA's older emitters of fused loops take half the time to compile. Later releases have none.
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "0" and importlib.metadata.version("jaxlib").startswith(
        "0.10."
    ):
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook looks it up by name)

CHECKED = [
    "helios_jax.heliosbench",
    "helios_jax.models",
    "helios_jax.diffusion",
    "helios_jax.sampling",
    "helios_jax.runtime",
]
if "FUZZ_COUNTS" not in os.environ:  # a fuzzed input meets the code as it is used
    install_import_hook(CHECKED, "tests.typecheck.check")

# Tracing makes millions of objects that are kept: looking through them for garbage took an eighth of the time.
gc.set_threshold(200_000, 20, 100)

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

FAST = "JAX_DISABLE_MOST_OPTIMIZATIONS"
OPTIMIZED = {"aot", "fuzz", "parity"}  # folders; of parity not
PIPELINES = {"parity/test_context.py", "parity/test_lora.py", "parity/test_pipeline.py"}
# Of files, datasets, options and numpy, and others whose programs other tests run, too (`make aot` plans on both).
PLAIN = {"data", "media", "toy", "test_config.py", "test_docs.py", "test_package.py", "benchmarks/test_gpu_report.py"}
PLAIN |= {"models/test_tokenizer.py", "planner", "precompute", "test_deploy.py", "buckets", "test_sample.py"}
PLAIN |= {"test_lora_files.py", "test_pretrained_faults.py", "test_hub.py", "test_configs.py", "ablations"}
PLAIN |= {
    f"training/test_{name}.py"
    for name in ("ends", "kill", "operations", "progress", "saved", "stage_table", "start", "training_data", "work")
}
PLAIN |= {"training/test_laws.py", "training/test_player_losses.py", "sampling/test_overlap.py", "diffusion"}
PLAIN |= {f"runtime/test_{name}.py" for name in ("interrupts", "many")} | {"test_pretrained.py", "kernels/test_tune.py"}
PLAIN |= {
    f"sampling/test_{name}.py"
    for name in ("checkpoint", "csv", "download", "options", "outputs", "prompts", "resume", "table", "trained")
}
PLAIN |= {f"heliosbench/test_{name}.py" for name in ("rating", "bench_frames", "judge", "bench_cli", "blind")}


def pytest_collection_modifyitems(config, items):
    """Marks plain tests, and puts files with slow ones first, or one worker would end with them while others wait."""
    for item in items:
        path = item.path.relative_to(config.rootpath / "tests")
        if PLAIN & {path.parts[0], path.as_posix()}:
            item.add_marker("plain")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    """Also that of a test's other processes."""
    path = request.path.relative_to(request.config.rootpath / "tests")
    fast = (path.parts[0] not in OPTIMIZED or path.as_posix() in PIPELINES) and os.environ.get(FAST) != "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAST, str(int(fast)))
        _switch(FAST.lower(), fast)
        yield


def _switch(name: str, value: bool) -> None:
    """Sets the compiler's setting; jit would reuse what it compiled with the other."""
    if jax.config.read(name) != value:
        jax.config.update(name, value)
        jax.clear_caches()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny pipeline as a folder, which no test changes."""
    from tests import tiny  # after jax is set up

    return tiny.folder(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture
def changeable(folder, tmp_path):
    """A copy of the tiny pipeline's folder."""
    return shutil.copytree(folder, tmp_path / "pipeline")


@pytest.fixture
def config(tmp_path, folder):
    """The path of a config of sample.py that makes a video of the tiny pipeline."""
    from tests.tiny_run import CONFIG

    path = tmp_path / "sample.yaml"
    path.write_text(f"{CONFIG}model: {folder}\nout: {tmp_path}/video.mp4\n")
    return path
