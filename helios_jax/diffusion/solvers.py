"""Solvers as tables: a step is a linear combination of samples and predictions, its coefficients made on the host.

With velocity v and sigma, the model's prediction of the data is m = x - sigma v. Euler, UniPC (arXiv 2302.04867) and
the few-step DMD schedule then only differ in how the next sample is mixed from x, the sample before it, the last few m
and the point where the level began. A new solver is a function of its coefficients and a line in `SOLVERS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from helios_jax.diffusion.noising import predict_data


@struct.dataclass
class Steps:
    """The steps of one level; every field has the steps as its first dimension.

    A second dimension [steps, b] gives each sample of a batch its own steps (`diffusion.exits`).

    timestep, sigma: [steps]. predictor: [steps, 1 + order], the weights of x and of m now and before.
    corrector: [steps, 3 + order], the weights of x, of the sample one step before, and of m now and before; None for a
    solver that does not correct. restart: [steps], the weight of the level's start point; None without one.
    """

    timestep: Any
    sigma: Any
    predictor: Any
    corrector: Any = None
    restart: Any = None


@struct.dataclass
class SolverState:
    """Sample x, the (corrected) sample one step before, the last `order` predictions m, the newest first, and the
    sample that the level began with (None unless the solver returns to it)."""

    sample: Any
    last: Any
    predictions: Any
    origin: Any = None


@runtime_checkable
class Settings(Protocol):
    """The part of a scheduler's config that solvers read."""

    scheduler_type: str
    solver_order: int
    solver_type: str
    lower_order_final: bool
    disable_corrector: tuple[int, ...]


class Coefficients(NamedTuple):
    """A level's tables in float64, as the fields of `Steps`."""

    predictor: np.ndarray
    corrector: np.ndarray | None = None
    restart: np.ndarray | None = None


def euler(sigmas: np.ndarray, settings: Settings) -> Coefficients:
    """x + (next - sigma) v, written in x and m."""
    ratio = sigmas[1:] / sigmas[:-1]
    return Coefficients(np.stack([ratio, 1 - ratio], 1))


def dmd(sigmas: np.ndarray, settings: Settings) -> Coefficients:
    """(1 - next) m + next * start point: the prediction, renoised with the sample that the level began with."""
    return Coefficients(np.stack([np.zeros(len(sigmas) - 1), 1 - sigmas[1:]], 1), restart=sigmas[1:])


def unipc(sigmas: np.ndarray, settings: Settings) -> Coefficients:
    """UniPC of order `solver_order` in B(h) form, predicting data; a lower order at both ends."""
    steps, order = len(sigmas) - 1, settings.solver_order
    predictor, corrector = np.zeros((steps, 1 + order)), np.zeros((steps, 3 + order))
    used = 0  # the order of the step before, which its corrector shares
    for i in range(steps):
        corrector[i, 0] = 1.0
        if i > 0 and i - 1 not in settings.disable_corrector:
            x, m = _bh_weights(sigmas, i - 1, used, settings.solver_type, correct=True)
            corrector[i, :2] = 0.0, x
            corrector[i, 2 : 2 + len(m)] = m
        final = min(order, steps - i) if settings.lower_order_final else order
        used = min(final, i + 1)
        x, m = _bh_weights(sigmas, i, used, settings.solver_type, correct=False)
        predictor[i, 0] = x
        predictor[i, 1 : 1 + len(m)] = m
    return Coefficients(predictor, corrector)


def _bh_weights(sigmas: np.ndarray, i: int, order: int, kind: str, correct: bool) -> tuple[float, np.ndarray]:
    """The weights of x_i and of the predictions m (newest first) in x_{i+1}; a corrector also uses m_{i+1}."""

    def log_snr(sigma):
        return math.log(1 - sigma) - math.log(max(sigma, 1e-8))

    start, end = sigmas[i], sigmas[i + 1]
    h = log_snr(end) - log_snr(start)
    # Positions of the predictions in units of h, from the newest that the formula uses.
    nodes = [(log_snr(sigmas[i - k]) - log_snr(start)) / h for k in range(1, order)]
    if correct:
        nodes.append(1.0)
    phi1 = math.expm1(-h)
    b_h = -h if kind == "bh1" else phi1

    rho = np.array([0.5])
    # The simplified weights of UniP-2 and UniC-1 are part of the method as released.
    if not ((correct and order == 1) or (not correct and order == 2)) and nodes:
        rows, right, phi, factorial = [], [], phi1 / -h - 1, 1
        for k in range(1, len(nodes) + 1):
            rows.append([r ** (k - 1) for r in nodes])
            right.append(phi * factorial / b_h)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rho = np.linalg.solve(np.array(rows), np.array(right))

    weights = np.zeros(order + 1 if correct else order)  # [m_{i+1},] m_i, m_{i-1}, ...
    now = 1 if correct else 0
    weights[now] = -(1 - end) * phi1
    for k, node in enumerate(nodes):
        weight = -(1 - end) * b_h * rho[k] / node
        at = 0 if correct and k == len(nodes) - 1 else now + 1 + k
        weights[at] += weight
        weights[now] -= weight
    return max(end, 1e-8) / max(start, 1e-8), weights


@dataclass(frozen=True)
class Solver:
    """Coefficients from a level's sigmas [steps + 1]; a schedule of `few_steps` leaves out the step before the end."""

    coefficients: Callable[[np.ndarray, Settings], Coefficients]
    few_steps: bool = False


# By the `scheduler_type` of scheduler_config.json.
SOLVERS = {"euler": Solver(euler), "unipc": Solver(unipc), "dmd": Solver(dmd, few_steps=True)}


def make_steps(settings: Settings, timesteps: np.ndarray, sigmas: np.ndarray) -> Steps:
    """The tables for `timesteps` [steps] and `sigmas` [steps + 1] (float64, ending in 0)."""

    def f32(x):
        return None if x is None else jnp.asarray(x, jnp.float32)

    return Steps(
        f32(timesteps), f32(sigmas[:-1]), *map(f32, SOLVERS[settings.scheduler_type].coefficients(sigmas, settings))
    )


def start(sample: Float[Array, "*shape"], steps: Steps) -> SolverState:
    """The state before the first step."""
    order = steps.predictor.shape[-1] - 1
    origin = None if steps.restart is None else sample
    return SolverState(sample, jnp.zeros_like(sample), jnp.zeros((order, *sample.shape), sample.dtype), origin)


def advance(state: SolverState, velocity: Float[Array, "*shape"], step: Steps) -> SolverState:
    """One step; `step` is one row of the tables, or one row for each sample. Computes in float32."""
    if jnp.ndim(step.sigma) == 1:
        batch: Any = SolverState(0, 0, 1, 0)
        return jax.vmap(_advance, (batch, 0, 0), batch)(state, velocity, step)
    return _advance(state, velocity, step)


def _advance(state: SolverState, velocity: Float[Array, "*shape"], step: Steps) -> SolverState:
    sample = state.sample
    prediction = predict_data(sample, velocity, step.sigma)
    if step.corrector is not None:
        seen = jnp.concatenate([prediction[None], state.predictions])
        sample = step.corrector[0] * sample + step.corrector[1] * state.last
        sample = sample + jnp.tensordot(step.corrector[2:], seen, 1, precision=jax.lax.Precision.HIGHEST)
    predictions = jnp.concatenate([prediction[None], state.predictions[:-1]])
    after = step.predictor[0] * sample + jnp.tensordot(
        step.predictor[1:], predictions, 1, precision=jax.lax.Precision.HIGHEST
    )
    if step.restart is not None:
        after = after + step.restart * state.origin
    return SolverState(after, sample, predictions, state.origin)
