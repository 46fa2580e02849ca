"""The command that makes videos: sample.py, and helios-sample where the package is installed.

The config says what to run; flags and `key=value` arguments override it. Frames go to the mp4 as chunks come, so it can
be watched while it grows and an interrupted run leaves the chunks that were done. Beside each video lies a JSON file
with its settings and figures. Exit code 0 when done, 1 when some videos of a CSV failed, 130 when interrupted by Ctrl-C
or SIGTERM (`runtime.interrupts`), 2 for input that cannot be used: one line names the fault, the rule and the remedy,
before the model is built.
"""

import dataclasses
import errno
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_origin, get_type_hints

from helios_jax import config as configs
from helios_jax.config import ConfigError
from helios_jax.config_types import options
from helios_jax.messages import one_line
from helios_jax.runtime import interrupts
from helios_jax.runtime.command import Lines, Parser, program_name, warnings_as_lines
from helios_jax.runtime.memory import is_out_of_memory, use_gpus_whole
from helios_jax.sampling.options import (
    FILES,
    MAKE,
    METHOD,
    NOISE,
    ContextConfig,
    SampleConfig,
    SamplingOptions,
    refuse_unused,
)

# Fields whose flag has another name and form.
OTHERWISE = {"switches": "--then", "loras": "--lora"}
# Errors of a path that was typed, wherever it is first used.
BAD_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)
LESS_MEMORY = (
    "out of memory: use a smaller height and width, precision=bfloat16, offload_text_encoder=true or a device with more"
    " memory (num_frames does not matter)"
)


def parse(argv: Sequence[str]) -> tuple[SampleConfig, Mapping[str, str]]:
    """Reads the config and the command line, which wins over it. Raises ConfigError.

    Also returns the options that the command line sets, each with the text that was typed for it, as in --fps.
    """
    parser = Parser(
        prog=program_name("sample.py"),
        usage="%(prog)s CONFIG [--flag X ...] [key=value ...]",
        description="Make a video from a prompt, an image or a video.",
        epilog="Every flag is also a key of the config, and key=value sets one, as in zero_steps=0.",
    )
    parser.add_argument("config", nargs="?", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the config")
    fields = [f for f in dataclasses.fields(SampleConfig) if f.name not in OTHERWISE]
    shared = {f.name for f in dataclasses.fields(SamplingOptions)}
    fields.sort(key=lambda f: f.name in shared)  # the prompt before the number of frames
    lists = [name for name, hint in get_type_hints(SampleConfig).items() if _is_list(hint)]
    for title in (MAKE, METHOD, NOISE, FILES):
        group = parser.add_argument_group(title)
        for f in fields:
            if f.metadata["group"] == title:
                flag, many = f"--{f.name.replace('_', '-')}", f.name in lists
                text = f.metadata["help"].replace("%", "%%") + _default(f)
                if f.name == "overwrite":
                    group.add_argument(flag, help=text, action="store_const", const="true")
                else:
                    group.add_argument(flag, help=text, metavar="X,X" if many else "X")
        if title == METHOD:
            group.add_argument("--lora", action="append", metavar="FILE[=SCALE]", help="to merge in; may be repeated")
        if title == MAKE:
            group.add_argument(
                "--then",
                nargs=2,
                action="append",
                metavar=("AT", "PROMPT"),
                help="a prompt that takes over at a chunk (4) or a second (9.5s); may be repeated",
            )
    args = parser.parse_intermixed_args(argv)
    if args.config is None:
        parser.error("name a config, such as configs/toy/sample.yaml")
    given: dict[str, Any] = {f.name: value for f in fields if (value := getattr(args, f.name)) is not None}
    for name in lists:
        if name in given:
            text = given[name].strip()
            text = text[1:-1] if text.startswith("[") and text.endswith("]") else text  # as YAML writes lists
            given[name] = [part.strip() for part in text.split(",")]
    if args.lora:
        given["loras"] = args.lora
    if args.then:
        given["switches"] = [
            {"prompt": prompt, **({"seconds": at[:-1]} if at.endswith("s") else {"chunk": at})}
            for at, prompt in args.then
        ]
    return _load(args.config, args.overrides, given)


def _load(path: str, overrides: Sequence[str], given: Mapping[str, Any]) -> tuple[SampleConfig, Mapping[str, str]]:
    """The config, and what was typed, as `parse` returns them.

    With `resume`, settings that the command line leaves out are the state's. Raises ConfigError.
    """
    if (stage := configs.peek(path, overrides, "stage")) is not None:
        raise ConfigError(
            f"{stage[1]}: stage: is of training; run python train.py {path}, or name a config of sampling"
        )
    found = configs.peek(path, overrides, "resume")
    resume = given.get("resume", found and found[0])
    if not isinstance(resume, str):
        config = configs.load(path, overrides, SampleConfig, given, OTHERWISE)
        typed = {name: name for name in configs.keys(overrides)}
        typed |= {name: f"--{name.replace('_', '-')}" for name in given}
        _check_used(config, typed)
        return config, typed
    from helios_jax.sampling import resume as resuming  # after the arguments: jax takes seconds to import

    settings = resuming.settings_of(resuming.read_state(os.path.expanduser(resume)), resume)
    config = configs.load(path, overrides, SampleConfig, given, OTHERWISE, {f"state {resume}": settings})
    resuming.check_typed(config, settings, resume)
    return config, {}


def _check_used(config: SampleConfig, typed: Mapping[str, str]) -> None:
    """Raises ConfigError for an option of the command line that the run would not use; a YAML's may wait for a use.

    `run` refuses more of them, once it has read the CSV and the model.
    """
    many, one_prompt = config.csv is not None, not config.switches
    without_input = not many and config.image is None and config.video is None
    unused = {f.name: (without_input, "there is no input image or video") for f in dataclasses.fields(ContextConfig)}
    unused |= {
        "prompt": (many, "the csv has the prompts"),
        "video_fps": (not many and config.video is None, "it is the rate of an input video, and there is none"),
        "interpolation_steps": (not many and one_prompt, "no prompt takes over"),
        "interpolate_time": (not many, "it is for a csv with a column prompt_index"),
    }
    refuse_unused(unused, typed)


def _is_list(hint: Any) -> bool:
    return any(get_origin(kind) in (list, tuple) for kind in options(hint))


def _default(f: Any) -> str:
    """The default in brackets, where it says more than the help text."""
    if f.default in (None, "", dataclasses.MISSING):
        return ""
    value = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    ours, handler = logging.getLogger("helios_jax"), Lines(program_name("sample.py"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    use_gpus_whole()
    with warnings_as_lines(program_name("sample.py")):  # each once, however many videos of a CSV it is true of
        try:
            config, typed = parse(sys.argv[1:] if argv is None else argv)
            # After the arguments: jax takes seconds to import.
            from helios_jax.runtime.compilation import enable_cache
            from helios_jax.sampling.run import run

            enable_cache()
            return run(config, typed)
        except (ValueError, FileNotFoundError) as error:  # ConfigError, CheckpointError, ...: one line each
            print(f"{program_name('sample.py')}: {error}", file=sys.stderr)
            return 2
        except (OSError, FloatingPointError) as error:  # a disk that is full, say: what was written stays
            print(f"{program_name('sample.py')}: {error}", file=sys.stderr)
            return 2 if isinstance(error, OSError) and error.errno in BAD_PATHS else 1
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            print(f"{program_name('sample.py')}: {one_line(error)}; {LESS_MEMORY}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as error:
            if not isinstance(error, interrupts.Interrupted):  # which has said so
                print(f"{program_name('sample.py')}: interrupted", file=sys.stderr)
            return interrupts.EXIT_CODE
        finally:
            ours.removeHandler(handler)
