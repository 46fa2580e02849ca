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
    num_inference_steps: int | None = None  # Base checkpoints; null: 50
    pyramid_num_inference_steps_list: list[int] | None = None  # pyramid checkpoints; null: 20, 20, 20 or 2, 2, 2
    guidance_scale: float | None = None  # null: 5, and none for Distilled
    use_zero_init: bool = True
    zero_steps: int = 1
    is_amplify_first_chunk: bool = False  # Distilled checkpoints: twice the steps for the first chunk
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
        for name in ("num_frames", "fps", "num_latent_frames_per_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
