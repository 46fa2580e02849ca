"""Noise levels: sigma tables in float64 on the host, and how they shift with the size of the video."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np


@dataclass(unsafe_hash=True)
class SchedulerConfig:
    """scheduler_config.json of diffusers' `HeliosScheduler`, in its names; sigma is 1 at pure noise and 0 at data."""

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
            "scheduler_type": ("euler", "unipc", "dmd"),
            "solver_type": ("bh1", "bh2"),
            "time_shift_type": ("exponential", "linear"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(allowed)}")
        if self.use_dynamic_shifting and self.shift != 1.0:
            raise ValueError(f"use_dynamic_shifting replaces shift, so shift must be 1, not {self.shift}")


def dynamic_shift(tokens: int) -> float:
    """mu, linear in the tokens of a chunk: 0.5 at 256 and 1.15 at 4096 (diffusers' calculate_shift)."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def shift_sigmas(sigmas: np.ndarray, mu: float, kind: str) -> np.ndarray:
    """s / (s + 1/sigma - 1) with s = exp(mu) for "exponential" and mu for "linear"; 0 stays 0."""
    s = np.exp(mu) if kind == "exponential" else mu
    return s * sigmas / (s * sigmas + 1 - sigmas)


def sigmas(config: SchedulerConfig, num_inference_steps: int, tokens: int) -> np.ndarray:
    """Sigmas [steps + 1] of one chunk of `tokens` noisy tokens, float64, from 0.999 (shifted) down to 0.

    The Base pipeline's table: `HeliosScheduler.set_timesteps` as `HeliosPipeline` calls it.
    """
    table = np.linspace(0.999, 0.0, num_inference_steps + 1)
    return shift_sigmas(table, dynamic_shift(tokens), config.time_shift_type) if config.use_dynamic_shifting else table
