"""Options of sampling, stated once: Python arguments, YAML configs and the command line all derive from them.

A field says its name, type, default and help text; its type and default decide how a flag is read.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints

from helios_jax.config import ConfigError, did_you_mean
from helios_jax.config_types import describe, misfit, options, shown, unreadable
from helios_jax.locations import check_locations, location
from helios_jax.runtime.seeds import check_seed

# Limits beyond any use: larger numbers would overflow or fill the memory before an error could be reported.
MOST_VIDEOS = 10_000  # of a prompt, planned at once
MOST_PIXELS = 2**14  # of a side
MOST_STEPS = 10_000
MOST_GUIDANCE = 1_000
MOST_LATENT_FRAMES = 1_000
MOST_TOKENS = 2**14
MOST_FRAMES = 2**40
MOST_VIDEO_FPS = 1_000  # a higher rate only repeats the file's frames
MOST_FPS = 2**31 - 1  # FFmpeg keeps rates as 32-bit numbers
WEIGHTS_FPS = 24  # the rate of the clips that the released weights were trained on
Function = TypeVar("Function", bound=Callable[..., Any])

# ~ is the home folder in all.
PATHS = ("image", "video", "csv", "model", "transformer", "out", "state", "resume", "profile")

MAKE, METHOD, NOISE, FILES = (
    "what to make",
    "how to make it",
    "noise that the frames of an input image or video get",
    "where it goes",
)


def option(default: Any, text: str, group: str = METHOD) -> Any:
    """A field with its help text and the group of flags that it belongs to."""
    metadata = {"help": text, "group": group}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _at_most(**values: tuple[float | None, float]) -> None:
    for name, (value, most) in values.items():
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, got {shown(value)}")


def _is_text(**values: str) -> None:
    for name, value in values.items():
        if wrong := unreadable(value, name):
            raise ValueError(wrong)


@dataclass
class PromptSwitch:
    """A prompt that takes over at a chunk (counted from 0) or in the chunk that a second falls into.

    `crossfade` is the number of chunks over which the text's embedding moves linearly from the prompt before; 0 changes
    at once, null takes the run's `interpolation_steps`.
    """

    prompt: str = ""
    chunk: int | None = None
    seconds: float | None = None
    crossfade: int | None = None

    def __post_init__(self):
        if not self.prompt.strip():
            raise ValueError("a prompt switch needs a prompt, got an empty one")
        _is_text(prompt=self.prompt)
        if (self.chunk is None) == (self.seconds is None):
            raise ValueError(f"give chunk or seconds, one of them, to switch to {self.prompt!r}")
        _at_least(1, chunk=self.chunk)
        _at_least(0, crossfade=self.crossfade)
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be above 0 to switch to {self.prompt!r}, got {self.seconds}")


@dataclass
class ContextConfig:
    """Noise added to the frames of an input image or video, under the names of diffusers' Helios pipelines.

    A frame becomes sigma * noise + (1 - sigma) * latent, sigma uniform between two bounds. As in diffusers, the image
    sigmas apply to the anchor, which is the image or a video's first frame. The video sigmas apply to all other frames,
    also to the repetition of an image.
    """

    add_noise_to_image_latents: bool = option(True, "whether an input image gets noise", NOISE)
    image_noise_sigma_min: float = option(0.111, "least noise of the anchor: image or first frame", NOISE)
    image_noise_sigma_max: float = option(0.135, "most noise of the anchor", NOISE)
    add_noise_to_video_latents: bool = option(True, "whether an input video gets noise", NOISE)
    video_noise_sigma_min: float = option(0.111, "least noise of all other frames", NOISE)
    video_noise_sigma_max: float = option(0.135, "most noise of all other frames", NOISE)

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
class SamplingOptions(ContextConfig):
    """Options of a video beside its prompts and inputs; names and meanings are diffusers' where it has them."""

    height: int = option(384, "pixels; a multiple of 16 for Base and of 64 for the released pyramid weights", MAKE)
    width: int = option(640, "pixels; a multiple as of the height", MAKE)
    num_frames: int | None = option(132, "frames of the video, exactly; null: a stream without end", MAKE)
    fps: int = option(WEIGHTS_FPS, "frames a second of the file, and of the seconds of a prompt switch", MAKE)
    video_fps: float | None = option(None, "rate at which an input video file is read; null: all its frames", MAKE)
    interpolation_steps: int = option(3, "chunks over which a prompt fades in after a switch", MAKE)
    num_inference_steps: int | None = option(None, "denoising steps a chunk of a Base checkpoint; null: 50")
    pyramid_num_inference_steps_list: list[int] | None = option(
        None,
        "steps of each level of a pyramid checkpoint, coarsest first; null: 20,20,20 for Mid, those of its training for"
        " Distilled, 2,2,2 if it does not say",
    )
    guidance_scale: float | None = option(
        None, "how closely to follow the prompt; 1 switches guidance off and halves the time; null: 5 (Distilled: off)"
    )
    use_cfg_zero_star: bool | None = option(
        None, "guide as CFG-Zero* does, its negative part scaled; null: as the checkpoint says (Mid: yes, Base: no)"
    )
    use_zero_init: bool = option(True, "with CFG-Zero*, leave the sample as it is in the first steps")
    zero_steps: int = option(1, "with use_zero_init, steps 0 to zero_steps of the first level leave it so")
    is_amplify_first_chunk: bool | None = option(
        None, "twice the steps for the first chunk (Distilled); null: if it was trained so, and says so"
    )
    is_skip_first_chunk: bool = option(False, "the anchor becomes the first frame of the second chunk")
    history_sizes: tuple[int, ...] | None = option(
        None, "latent frames of the long, mid and short history; null: as trained, 16,2,1 for the released weights"
    )
    num_latent_frames_per_chunk: int | None = option(None, "latent frames made at a time; null: as trained, usually 9")
    positions: Literal["relative", "absolute"] | None = option(
        None,
        "frame indices of the window, or counted from the video's start, which differ with an anchor alone; null: as"
        " trained, usually relative",
    )
    use_anchor: bool | None = option(
        None, "keep the video's first latent frame in the history; null: as trained, usually yes"
    )
    overlap_chunks: bool = option(
        False,
        "softer borders between chunks: each begins with the last frame of the one before, which is shown once, so that"
        " it adds one frame less",
    )
    max_sequence_length: int | None = option(
        None, "positions of the text; null: as many as the tokenizer allows, 512 at most"
    )

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
        for steps in self.pyramid_num_inference_steps_list or ():
            _at_most(pyramid_num_inference_steps_list=(steps, MOST_STEPS))
        for size in self.history_sizes or ():
            _at_most(history_sizes=(size, MOST_LATENT_FRAMES))
        _at_most(
            height=(self.height, MOST_PIXELS),
            width=(self.width, MOST_PIXELS),
            num_frames=(self.num_frames, MOST_FRAMES),
            fps=(self.fps, MOST_FPS),
            video_fps=(self.video_fps, MOST_VIDEO_FPS),
            guidance_scale=(self.guidance_scale, MOST_GUIDANCE),
            num_inference_steps=(self.num_inference_steps, MOST_STEPS),
            num_latent_frames_per_chunk=(self.num_latent_frames_per_chunk, MOST_LATENT_FRAMES),
            max_sequence_length=(self.max_sequence_length, MOST_TOKENS),
        )
        if self.video_fps is not None and not self.video_fps > 0:
            raise ValueError(f"video_fps must be above 0, got {self.video_fps}")
        if self.history_sizes is not None and len(self.history_sizes) != 3:
            raise ValueError(f"history_sizes must be three numbers (long, mid, short), got {list(self.history_sizes)}")

    def changed(self, changes: Mapping[str, Any]) -> "SamplingOptions":
        """A copy with `changes`; sequences in them may be lists or tuples.

        Raises TypeError, in one line, for a name that is no option, and ValueError for a value of another type.
        """
        hints = get_type_hints(SamplingOptions)
        for name in changes:
            if name not in hints:
                near = "; give seed" if name == "generator" else did_you_mean(name, list(hints))
                raise TypeError(f"{name} is no option of sampling{near}")
        # numpy's numbers are taken as such. In YAML a text may stand for a number, here it may not.
        given = {name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in changes.items()}
        for name, value in given.items():
            if isinstance(value, str) and {int, float} & {*options(hints[name])}:
                raise ValueError(f"{name} must be {describe(hints[name])}, got {shown(value)}")
            if wrong := misfit(hints[name], value, name):
                raise ValueError(wrong)
        for name, kind in {"history_sizes": tuple, "pyramid_num_inference_steps_list": list}.items():
            if given.get(name) is not None:
                given[name] = kind(given[name])
        return dataclasses.replace(self, **given)


def takes_options(function: Function) -> Function:
    """Decorator that lists every option as a keyword argument, in place of `**changes`, in signature and docstring."""
    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = sorted(dataclasses.fields(SamplingOptions), key=lambda f: f.metadata["group"] == NOISE)
    added = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields
    ]
    function.__signature__ = signature.replace(parameters=[*kept, *added])  # pyright: ignore[reportFunctionMemberAccess]
    lines = [f"    {f.name}: {f.metadata['help']}" for f in fields]
    function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
    return function


def refuse_unused(unused: Mapping[str, tuple[bool, str]], typed: Mapping[str, str]) -> None:
    """Raises ConfigError for an option that was typed and has no effect.

    `unused` says of options whether they have none, and why; `typed` maps options to the text that set them.
    """
    for name, (is_unused, reason) in unused.items():
        if is_unused and name in typed:
            raise ConfigError(f"{typed[name]} has no effect: {reason}; leave it out")


@dataclass
class SampleConfig(SamplingOptions):
    """Settings of one run of sample.py, which makes one video or, with `csv`, many: adds inputs to `SamplingOptions`.

    A CSV has a row per video: a column prompt (or refined_prompt) and optional columns id, negative_prompt, image (or
    image_name), video (or video_name), seed and num_frames (or duration). With a column prompt_index, the rows of one
    id are one video, whose prompts switch every `interpolate_time` chunks (upstream's interactive format). Files in it
    are relative to the CSV's folder; http and https addresses are downloaded.
    """

    prompt: str = option("", "what the video shows", MAKE)
    negative_prompt: str = option("", "what the video keeps away from", MAKE)
    image: str | None = option(None, "a picture that the video begins with: a file or an http(s) address", MAKE)
    video: str | None = option(None, "a video to continue, at least a chunk long: a file or an http(s) address", MAKE)
    switches: list[PromptSwitch] = option([], "prompts that take over later", MAKE)
    seed: int = option(0, "the same seed makes the same video", MAKE)
    num_videos_per_prompt: int = option(1, "videos of each prompt, with seeds seed, seed + 1, ...", MAKE)
    csv: str | None = option(
        None, "many videos: a CSV with a column prompt, or a .txt with a prompt per line (docs/sampling.md)", MAKE
    )
    ids: list[str] | None = option(None, "rows of the CSV to make, by id; null: all", MAKE)
    interpolate_time: int = option(7, "chunks of each prompt of a CSV with a column prompt_index", MAKE)
    model: str = option("BestWishYsh/Helios-Base", "a diffusers folder or a hub name")
    transformer: str = option(
        "transformer", "the model's subfolder with the transformer, such as transformer_ode, or a folder elsewhere"
    )
    loras: list[str] = option([], "LoRA files to merge in, each with =SCALE behind it if that is not 1")
    precision: Literal["float32", "bfloat16"] | None = option(
        None, "float32 or bfloat16; null: float32 on CPU, bfloat16 elsewhere"
    )
    attention: Literal["xla", "cudnn", "pallas"] | None = option(
        None, "implementation of attention: xla, cudnn or pallas (docs/kernels.md); null: the device's best"
    )
    norms: Literal["xla", "pallas"] | None = option(
        None, "implementation of the norms: xla or pallas; null: the device's best"
    )
    offload_text_encoder: bool | None = option(
        None, "keep the text encoder in the host's memory between prompts; null: where there is an accelerator"
    )
    out: str = option("outputs/video.mp4", "file.mp4, file.npz (latents) or a folder of PNGs; with csv a folder", FILES)
    format: Literal["mp4", "png", "npz"] | None = option(None, "mp4, png or npz; null: as `out` ends", FILES)
    naming: Literal["id", "heliosbench"] = option(
        "id", "names of a CSV's files: id (7.mp4) or heliosbench (7_240_ori240.mp4)", FILES
    )
    overwrite: bool = option(False, "replace files that are there already", FILES)
    state: str | None = option(None, "a file to keep up to date while the video grows, to go on from", FILES)
    resume: str | None = option(None, "such a file: make the rest of that video", FILES)
    profile: str | None = option(None, "a folder for a profile of the second chunk, for Perfetto or XProf", FILES)
    ray: str | None = option(
        None, "with csv, a Ray cluster that makes the videos: auto, HOST:PORT, ray://HOST:PORT or local", FILES
    )
    ray_worker: str | None = option(
        None, "what each worker on it needs, such as GPU=1, TPU=4 or CPU=8; null: a GPU or TPU, else a CPU", FILES
    )

    def __post_init__(self):
        super().__post_init__()
        for name in PATHS:
            if (path := getattr(self, name)) is not None:
                _is_text(**{name: path})
                if name not in ("image", "video"):  # which can be addresses, too (`sampling.download`)
                    check_locations(**{name: path})
                if not path.strip() or (name in ("out", "state") and not location(path).name):  # "/" and "."
                    raise ValueError(f"{name} must name a file or a folder, got {path!r}")
                setattr(self, name, os.path.expanduser(path))
        _is_text(prompt=self.prompt, negative_prompt=self.negative_prompt)
        self.loras = [os.path.expanduser(text) for text in self.loras]
        _at_least(1, num_videos_per_prompt=self.num_videos_per_prompt, interpolate_time=self.interpolate_time)
        if self.num_videos_per_prompt > MOST_VIDEOS:
            raise ValueError(f"num_videos_per_prompt must be at most {MOST_VIDEOS}, got {self.num_videos_per_prompt}")
        check_seed(check_seed(self.seed) + self.num_videos_per_prompt - 1, "the last video's seed")
        if self.csv is None and self.resume is None and not self.prompt.strip():
            raise ValueError('prompt must say what to show, as in --prompt "a red square moves right"')
        if self.image is not None and self.video is not None:
            raise ValueError("image and video were both given: a video begins with the one or continues the other")
        if self.csv is not None and (self.state or self.resume):
            raise ValueError("csv makes many videos, state and resume are of one: leave either out")
        if self.num_videos_per_prompt > 1 and (self.state or self.resume or self.profile):
            raise ValueError("num_videos_per_prompt makes many videos; state, resume and profile are of one")
        if self.csv is not None and self.profile is not None:
            raise ValueError("profile is of one video, csv makes many: leave either out")
        if self.csv is None and self.ray is not None:
            raise ValueError("ray makes the videos of a csv on many machines: give csv, or leave ray out")
        if self.csv is None and (used := "ids" if self.ids else "naming" if self.naming != "id" else None):
            raise ValueError(f"{used} is for a csv of prompts: give csv, or leave it out")

    def options(self) -> SamplingOptions:
        """The options of each video."""
        return SamplingOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingOptions)})
