"""Options of a sampling call, and the schema of the configs that sample.py reads."""

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
class ContextConfig:
    """Noise that the frames of an input image or video get, in the names of diffusers' Helios pipelines.

    A frame becomes sigma * noise + (1 - sigma) * latent, sigma uniform between two bounds. As in diffusers the image
    sigmas are those of the anchor, be it the image or a video's first frame; all else takes the video sigmas, an
    image's repetition included.
    """

    add_noise_to_image_latents: bool = True
    image_noise_sigma_min: float = 0.111
    image_noise_sigma_max: float = 0.135
    add_noise_to_video_latents: bool = True
    video_noise_sigma_min: float = 0.111
    video_noise_sigma_max: float = 0.135

    def __post_init__(self) -> None:
        for name, (low, high) in {"image": self.image_sigmas, "video": self.video_sigmas}.items():
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"{name}_noise_sigma_min must be from 0 to {name}_noise_sigma_max, and that at most 1,"
                    f" got {low} and {high}"
                )

    @property
    def image_sigmas(self) -> tuple[float, float]:
        return self.image_noise_sigma_min, self.image_noise_sigma_max

    @property
    def video_sigmas(self) -> tuple[float, float]:
        return self.video_noise_sigma_min, self.video_noise_sigma_max


@dataclass
class Options(ContextConfig):
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
        video_fps: the rate that an input video file is read at; null: all its frames as they are.
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
    video_fps: float | None = None
    interpolation_steps: int = 3
    fps: int = WEIGHTS_FPS

    def __post_init__(self):
        super().__post_init__()
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


@dataclass
class SampleConfig(Options):
    """One run of sample.py: a video, or with `csv` many; the rest of its fields are those of `Options`.

    A CSV has a row per video with columns prompt (or refined_prompt), and as far as wanted id, negative_prompt, image
    (or image_name), video (or video_name), seed and num_frames (or duration). With a column prompt_index the rows of an
    id are one video, whose prompts switch every `interpolate_time` chunks (upstream's interactive format). Files in it
    are relative to the CSV's folder.
    """

    model: str = "BestWishYsh/Helios-Base"  # a diffusers folder or a hub name
    transformer: str = "transformer"  # the model's subfolder with the transformer, such as transformer_ode
    loras: list[str] = field(default_factory=list)  # LoRA files, each with =SCALE behind it if that is not 1
    prompt: str = ""
    negative_prompt: str = ""
    image: str | None = None  # a picture that the video begins with
    video: str | None = None  # a video to be continued
    switches: list[Switch] = field(default_factory=list)  # prompts that take over later
    csv: str | None = None  # many videos in place of one
    ids: list[str] | None = None  # of the CSV's rows; null: all
    interpolate_time: int = 7  # chunks of each prompt of an interactive CSV
    naming: Literal["id", "heliosbench"] = "id"  # of a CSV's files: 7.mp4 or HeliosBench's 7_240_ori240.mp4
    seed: int = 0
    num_videos_per_prompt: int = 1  # with seeds seed, seed + 1, ...
    precision: Literal["float32", "bfloat16"] | None = None  # null: float32 on CPU, bfloat16 elsewhere
    # implementations in the transformer (docs/kernels.md); null: the device's best
    attention: Literal["xla", "cudnn", "pallas"] | None = None
    norms: Literal["xla", "pallas"] | None = None
    # the text encoder waits in the host's memory between prompts; null: where there is an accelerator
    offload_text_encoder: bool | None = None
    out: str = "outputs/video.mp4"  # a file; with csv the folder of all files
    format: Literal["mp4", "png", "npz"] | None = None  # png: a folder of frames; npz: latents; null: as `out` ends
    state: str | None = None  # a file that is kept up to date while the video grows, to go on from
    resume: str | None = None  # such a file: make what is missing of that video
    profile: str | None = None  # a folder for a trace of the second chunk, which is warm

    def __post_init__(self):
        super().__post_init__()
        _at_least(0, seed=self.seed)
        _at_least(1, num_videos_per_prompt=self.num_videos_per_prompt, interpolate_time=self.interpolate_time)
        if self.csv is None and self.resume is None and not self.prompt.strip():
            raise ValueError('prompt must say what to show, as in --prompt "a red square moves right"')
        if self.image is not None and self.video is not None:
            raise ValueError("image and video were both given: a video begins with the one or continues the other")
        if self.csv is not None and (self.state or self.resume):
            raise ValueError("csv makes many videos, state and resume are of one: leave either out")
        if self.csv is not None and self.profile is not None:
            raise ValueError("profile is of one video, csv makes many: leave either out")
        if self.csv is None and (self.ids or self.naming != "id"):
            raise ValueError("ids and naming are for a csv of prompts: give csv, or leave them out")
