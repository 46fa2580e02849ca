"""What a sampling run is: the schema of configs that sample.py reads."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class SampleConfig:
    """One video from one prompt. Names are those of `HeliosPipeline`'s arguments where there is one."""

    model: str = "BestWishYsh/Helios-Base"  # a diffusers folder or a hub name
    prompt: str = ""
    negative_prompt: str = ""
    height: int = 384
    width: int = 640
    num_frames: int = 132
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    history_sizes: tuple[int, int, int] = (16, 2, 1)
    num_latent_frames_per_chunk: int = 9
    max_sequence_length: int | None = None  # null: the tokenizer's limit, 512 at most
    seed: int = 0
    precision: Literal["float32", "bfloat16"] | None = None  # null: float32 on CPU, bfloat16 elsewhere
    fps: int = 24
    out: str = "outputs/video.mp4"

    def __post_init__(self):
        if not self.prompt.strip():
            raise ValueError('prompt must say what to show, as in --prompt "a red square moves right"')
        for name in ("num_frames", "num_inference_steps", "fps", "num_latent_frames_per_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
