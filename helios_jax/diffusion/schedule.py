"""Noise levels: sigma tables in float64 on the host, and how they shift with the size of the video."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from helios_jax.diffusion.solvers import SOLVERS

Shift = Literal["exponential", "linear"] | None  # a dynamic shift of sigmas
MAX_SHIFT = 7.0  # of an exponential dynamic shift in training


@dataclass(unsafe_hash=True)
class SchedulerConfig:
    """scheduler_config.json of diffusers' `HeliosScheduler`, under its names; sigma is 1 at noise and 0 at data."""

    CLASS_NAME: ClassVar[str] = "HeliosScheduler"

    num_train_timesteps: int = 1000
    shift: float = 1.0
    stages: int = 3
    stage_range: tuple[float, ...] = (0, 1 / 3, 2 / 3, 1)
    gamma: float = 1 / 3
    thresholding: bool = False
    prediction_type: str = "flow_prediction"
    solver_order: int = 2
    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: Any = field(default=None, hash=False)
    use_flow_sigmas: bool = True
    scheduler_type: str = "unipc"
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def __post_init__(self) -> None:
        self.stage_range, self.disable_corrector = tuple(self.stage_range), tuple(self.disable_corrector)
        only = {"prediction_type": "flow_prediction", "predict_x0": True, "use_flow_sigmas": True}
        for name, value in only.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}: Helios models need {value!r}")
        for name, value in {"thresholding": False, "solver_p": None}.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it is not defined for latents, set {value!r}")
        choices = {
            "scheduler_type": tuple(SOLVERS),
            "solver_type": ("bh1", "bh2"),
            "time_shift_type": ("exponential", "linear"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(allowed)}")
        if self.use_dynamic_shifting and self.shift != 1.0:
            raise ValueError(f"use_dynamic_shifting replaces shift, so shift must be 1, not {self.shift}")

    @property
    def dynamic(self) -> Shift:
        """The dynamic shift, None without one."""
        return self.time_shift_type if self.use_dynamic_shifting else None


@dataclass(unsafe_hash=True)
class DMDSchedulerConfig(SchedulerConfig):
    """scheduler_config.json of diffusers' `HeliosDMDScheduler`: few steps, each noised again from the level's start."""

    CLASS_NAME: ClassVar[str] = "HeliosDMDScheduler"

    scheduler_type: str = "dmd"
    time_shift_type: Literal["exponential", "linear"] = "linear"


def dynamic_shift(tokens: int, kind: Shift, largest: float = math.inf) -> float:
    """The factor by which a dynamic shift moves sigmas: mu for "linear", exp(mu) for "exponential", 1 for None.

    mu is linear in the tokens of a chunk, 0.5 at 256 and 1.15 at 4096 (diffusers' calculate_shift). `largest` bounds
    exp(mu), not mu.
    """
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return 1.0 if kind is None else min(math.exp(mu), largest) if kind == "exponential" else mu


def training_shift(shape: Sequence[int], kind: Shift) -> float:
    """`dynamic_shift` for latents [b, t, h, w, c] in training, as upstream's: at a patch of 1 x 2 x 2, and bounded."""
    return dynamic_shift(math.prod(shape[1:4]) // 4, kind, MAX_SHIFT)


def shift(sigmas: Any, factor: float) -> Any:
    """Sigmas moved towards 1, noise, by a factor above 1: factor / (factor + 1/sigma - 1); 0 and 1 stay."""
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def sigmas(config: SchedulerConfig, num_inference_steps: int, tokens: int) -> np.ndarray:
    """Sigmas [steps + 1] of one chunk of `tokens` noisy tokens, float64, from 0.999 (shifted) down to 0.

    The table of a model without a pyramid: `HeliosScheduler.set_timesteps` as `HeliosPipeline` calls it.
    """
    table = np.linspace(0.999, 0.0, num_inference_steps + 1)
    return shift(table, dynamic_shift(tokens, config.dynamic))


@dataclass(frozen=True)
class LevelRange:
    """One level of the pyramid on the training schedule.

    `start` and `end` are the sigmas between which it moves, `start` after the correction for upsampled noise;
    `entry` is its start before that correction; `timesteps` the highest and the lowest timestep the model is given.
    """

    start: float
    end: float
    entry: float
    timesteps: tuple[float, float]


def level_ranges(config: SchedulerConfig) -> tuple[LevelRange, ...]:
    """The levels, coarsest first (`HeliosScheduler.init_sigmas_for_each_stage`)."""
    train = config.num_train_timesteps
    base = 1.0 - np.linspace(1, 1 / train, train + 1)
    table = np.flip(shift(base, config.shift))[:-1]
    moves = []
    for i in range(config.stages):
        first, last = int(config.stage_range[i] * train), int(config.stage_range[i + 1] * train)
        entry, end = float(table[first]), float(table[last]) if last < train else 0.0
        start = entry if i == 0 else 1 - upsampling_weights(entry, config.gamma)[0] * (1 - entry)
        moves.append((start, end, entry))
    # Each level's share of the timesteps is proportional to the range of sigmas that it covers.
    passed = np.concatenate([[0.0], np.cumsum([start - end for start, end, _ in moves])])
    shares = passed / passed[-1]
    out = []
    for i, (start, end, entry) in enumerate(moves):
        high = min(table[int(shares[i] * train)] * train, 999.0)
        low = table[min(int(shares[i + 1] * train), train - 1)] * train
        # The lowest is one of a thousand steps above the next level's highest.
        out.append(LevelRange(start, end, entry, (float(high), float(high + (low - high) * (train - 1) / train))))
    return tuple(out)


def upsampling_weights(entry: float, gamma: float) -> tuple[float, float]:
    """(alpha, beta) of alpha * upsampled latents + beta * block noise on entering a level at sigma `entry`."""
    alpha = 1 / (np.sqrt(1 + 1 / gamma) * entry + (1 - entry))
    return float(alpha), float(alpha * entry / np.sqrt(gamma))
