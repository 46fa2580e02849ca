"""What a sampling run is: the options of a call, and the schema of configs that sample.py reads."""

from dataclasses import dataclass, field
from typing import Literal

WEIGHTS_FPS = 24  # the rate of the clips that the released weights were trained on


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass
class Switch:
    """A prompt that takes over at a chunk (counted from 0) or in the chunk that a second falls into.

    `crossfade` is over how many chunks the text's embedding moves linearly from the prompt before; 0 changes at once,
    null takes the run's `interpolation_steps`.
    """

    prompt: str = ""
    chunk: int | None = None
    seconds: float | None = None
    crossfade: int | None = None

    def __post_init__(self):
        if not self.prompt.strip():
            raise ValueError("a prompt switch needs a prompt, got an empty one")
        if (self.chunk is None) == (self.seconds is None):
            raise ValueError(f"give chunk or seconds, one of them, to switch to {self.prompt!r}")
        _at_least(1, chunk=self.chunk)
        _at_least(0, crossfade=self.crossfade)
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be above 0 to switch to {self.prompt!r}, got {self.seconds}")


@dataclass
class Options:
    """The arguments of a pipeline call beside prompts and inputs; names and meanings are diffusers' where it has them.

    Attributes:
        height, width: pixels; multiples of 16 for Base and of 64 for the released pyramid weights.
        num_frames: pixel frames, exactly as many are made; null: a stream without end.
        num_inference_steps: steps a chunk of a Base checkpoint; null: 50.
        pyramid_num_inference_steps_list: steps per level of a pyramid checkpoint, coarsest first; null: 20, 20, 20 for
            Mid and 2, 2, 2 for Distilled.
        guidance_scale: classifier-free guidance, off at 1 and below; null: 5 (Distilled: none).
        use_zero_init, zero_steps: with CFG-Zero*, steps 0 to zero_steps of the first level stand still.
        is_amplify_first_chunk: twice the steps for the first chunk (Distilled).
        is_skip_first_chunk: the anchor becomes the first frame of the second chunk.
        history_sizes: latent frames of the long, mid and short history.
        num_latent_frames_per_chunk: latent frames made at a time.
        max_sequence_length: positions of the text; null: what the tokenizer allows, 512 at most.
        add_noise_to_image_latents, image_noise_sigma_min, image_noise_sigma_max: noise on an input image's latent (and
            on the first frame of an input video), its strength uniform between the two.
        add_noise_to_video_latents, video_noise_sigma_min, video_noise_sigma_max: the same for an input video's frames.
        interpolation_steps: chunks over which a switched prompt fades in.
        fps: frames a second: what `seconds` of a prompt switch count in, and the rate of the file.
    """

    height: int = 384
    width: int = 640
    num_frames: int | None = 132
    num_inference_steps: int | None = None
    pyramid_num_inference_steps_list: list[int] | None = None
    guidance_scale: float | None = None
    use_zero_init: bool = True
    zero_steps: int = 1
    is_amplify_first_chunk: bool = False
    is_skip_first_chunk: bool = False
    history_sizes: tuple[int, ...] = (16, 2, 1)
    num_latent_frames_per_chunk: int = 9
    max_sequence_length: int | None = None
    add_noise_to_image_latents: bool = True
    image_noise_sigma_min: float = 0.111
    image_noise_sigma_max: float = 0.135
    add_noise_to_video_latents: bool = True
    video_noise_sigma_min: float = 0.111
    video_noise_sigma_max: float = 0.135
    interpolation_steps: int = 3
    fps: int = WEIGHTS_FPS

    def __post_init__(self):
        _at_least(
            1,
            num_frames=self.num_frames,
            fps=self.fps,
            num_latent_frames_per_chunk=self.num_latent_frames_per_chunk,
            max_sequence_length=self.max_sequence_length,
        )
        _at_least(0, interpolation_steps=self.interpolation_steps, zero_steps=self.zero_steps)
        if len(self.history_sizes) != 3:
            raise ValueError(f"history_sizes must be three numbers (long, mid, short), got {list(self.history_sizes)}")
        for kind in ("image", "video"):
            low, high = (getattr(self, f"{kind}_noise_sigma_{end}") for end in ("min", "max"))
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"{kind}_noise_sigma_min and {kind}_noise_sigma_max must be between 0 and 1 and in this order,"
                    f" got {low} and {high}"
                )


@dataclass
class SampleConfig(Options):
    """One run of sample.py: a video, or with `prompts_csv` many; the rest of its fields are `Options`."""

    model: str = "BestWishYsh/Helios-Base"  # a diffusers folder or a hub name
    prompt: str = ""
    negative_prompt: str = ""
    image: str | None = None  # a picture that the video begins with
    video: str | None = None  # a video to be continued
    switches: list[Switch] = field(default_factory=list)  # prompts that take over later
    prompts: str | None = None  # a YAML or CSV file of the prompts of one video, in place of prompt and switches
    seed: int = 0
    num_videos_per_prompt: int = 1  # with seeds seed, seed + 1, ...
    precision: Literal["float32", "bfloat16"] | None = None  # null: float32 on CPU, bfloat16 elsewhere
    out: str = "outputs/video.mp4"  # .mp4; .npz: the latents; no suffix: a folder of PNG frames

    def __post_init__(self):
        super().__post_init__()
        _at_least(0, seed=self.seed)
        _at_least(1, num_videos_per_prompt=self.num_videos_per_prompt)
