"""Recipes of the metrics by name, and the reasons why some metrics cannot be computed here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from helios_jax.heliosbench import model_files
from helios_jax.heliosbench.amplitude import Amplitude
from helios_jax.heliosbench.border_jumps import BorderJumps
from helios_jax.heliosbench.judge import Judge
from helios_jax.heliosbench.measure import Recipe, View
from helios_jax.heliosbench.metric import MissingError, require
from helios_jax.heliosbench.naturalness import PICTURES, Naturalness
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.fingerprint import file_hash


@dataclass(frozen=True)
class Needs:
    """Inputs of the metrics: the folder of weights, the judge, the frames of a chunk, and True if chunks overlap."""

    weights: Path | None = None
    judge: Judge | None = None
    chunk: int = 33
    overlap: bool = False


def _aesthetic(needs: Needs) -> Recipe:
    from helios_jax.heliosbench.aesthetic import Aesthetic  # jax takes seconds to import

    clip, head = model_files.find(needs.weights, model_files.CLIP), model_files.find(needs.weights, model_files.HEAD)
    return Recipe("aesthetic", partial(Aesthetic, clip, head), {"weights": [*map(file_hash, (clip, head))]})


def _semantic(needs: Needs) -> Recipe:
    from helios_jax.heliosbench.semantic import Semantic

    viclip = model_files.find(needs.weights, model_files.VICLIP)
    vocabulary = model_files.find(needs.weights, model_files.VOCABULARY, ("",))
    return Recipe("semantic", partial(Semantic, viclip, vocabulary), {"weights": [file_hash(viclip)]})


def _smoothness(needs: Needs) -> Recipe:
    from helios_jax.heliosbench.smoothness import Smoothness

    network = model_files.find(needs.weights, model_files.AMT, (".onnx", ".pt"))
    for module in ("cv2", *(("onnxruntime",) if network.suffix == ".onnx" else ())):
        require(module)
    return Recipe("motion_smoothness", partial(Smoothness, network), {"weights": [file_hash(network)]})


def _amplitude(needs: Needs) -> Recipe:
    require("cv2")
    return Recipe("motion_amplitude", partial(Amplitude))


def _border_jumps(needs: Needs) -> Recipe:
    chunks = ChunkFrames(needs.chunk, needs.chunk - needs.overlap)
    settings = {"chunk": needs.chunk} | ({"overlap": True} if needs.overlap else {})
    return Recipe("border_jumps", partial(BorderJumps, chunks), settings)


def _naturalness(needs: Needs) -> Recipe:
    if needs.judge is None:
        raise MissingError("no judge: name the address of a vision-language model by --judge")
    settings = {"model": needs.judge.model, "instruction": needs.judge.digest, "pictures": PICTURES}
    return Recipe("naturalness", partial(Naturalness, needs.judge), settings, remote=True)


MAKERS: Mapping[str, Callable[[Needs], Recipe]] = {
    "aesthetic": _aesthetic,
    "motion_amplitude": _amplitude,
    "motion_smoothness": _smoothness,
    "semantic": _semantic,
    "naturalness": _naturalness,
    "border_jumps": _border_jumps,
}


def make_recipes(names: list[str], needs: Needs, view: View) -> tuple[list[Recipe], dict[str, str]]:
    """The recipes of the metrics that can be computed, and by name a line on what each other metric lacks."""
    recipes, missing = [], {}
    for name in names:
        try:
            recipe = MAKERS[name](needs)
        except MissingError as error:
            missing[name] = str(error)
            continue
        settings = {"length": view.length, "size": list(view.box)} | dict(recipe.settings)
        recipes.append(Recipe(recipe.name, recipe.make, settings, recipe.remote))
    return recipes, missing
