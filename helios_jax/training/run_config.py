"""Configuration that every training run has, of any stage; a stage adds its own settings in a subclass."""

import re
from dataclasses import dataclass, field
from typing import Literal

from helios_jax.config import require
from helios_jax.locations import check_locations, is_remote
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.vae import VAEConfig
from helios_jax.runtime.seeds import check_seed
from helios_jax.sharding import MeshConfig
from helios_jax.training.optim import OptimConfig


@dataclass
class ModelConfig:
    """Sizes of the networks a run makes; null: not part of it, or read from the weights that `init` names."""

    transformer: TransformerConfig | None = None
    vae: VAEConfig | None = None


@dataclass
class DataConfig:
    """Folder of the samples, and the size of a batch; `batch_size` is global, over all hosts and devices.

    `leave_out` are numbers of records that are damaged. The next one is taken in the place of each, so that all others
    keep their order.
    """

    folder: str = "data/toy"
    batch_size: int = 8
    seed: int = 0  # of the shuffle, apart from the run's seed so that two runs can see the same samples
    workers: int = 0  # processes that read and cut samples; 0: threads of the run's own do
    leave_out: tuple[int, ...] = ()
    cache: str | None = None  # local copies of files of a bucket; null: helios_jax/data of the user's cache folder

    def __post_init__(self):
        require(bool(self.folder), "folder must name the folder of the training data")
        check_locations(folder=self.folder)
        check_locations(cache=self.cache, local=True)
        check_seed(self.seed)
        require(min(self.leave_out, default=0) >= 0, f"leave_out must hold numbers from 0 up, got {self.leave_out}")
        require(self.workers >= 0, f"workers must not be negative, got {self.workers}")
        require(self.batch_size > 0, f"batch_size must be at least 1, got {self.batch_size}")


@dataclass
class ValidationConfig:
    """Videos of `prompts` every `every` steps, in `<run>/validation`.

    The current model (its average if there is one) makes them, in a pipeline whose other parts come from
    `flow.components`.
    """

    every: int = 500
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    num_frames: int = 99
    height: int = 384
    width: int = 640
    num_inference_steps: int | None = None  # of a model without a pyramid; null: 50
    pyramid_num_inference_steps_list: tuple[int, ...] | None = None  # with a pyramid; null: 20, or a student's own
    guidance_scale: float | None = None  # null: 5, or none for a student
    seed: int = 0
    fps: int = 24

    def __post_init__(self):
        require(self.every > 0, f"every must be at least 1, got {self.every}")
        require(bool(self.prompts), "prompts must hold at least one; or leave validation out (null)")
        check_seed(self.seed)


@dataclass
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end.

    Three groups stay on disk: the newest `keep`, the `keep_best` with the smallest `metric`, and those of a step that
    `keep_every` divides. The metric is the mean over the steps since the checkpoint before.
    """

    folder: str | None = None  # null: `<run>/checkpoints`
    every: int = 500
    keep: int = 2
    keep_best: int = 0
    metric: str = "loss"
    keep_every: int | None = None

    def __post_init__(self):
        require(self.every > 0, f"every must be at least 1, got {self.every}")
        require(self.keep > 0, f"keep must be at least 1, got {self.keep}")
        require(self.keep_best >= 0, f"keep_best must not be negative, got {self.keep_best}")
        require(
            self.keep_best > 0 or self.metric == "loss",
            f"metric is {self.metric}, but no checkpoint is kept for it; set keep_best to 1 or more, or leave it out",
        )
        require(
            self.keep_every is None or (self.keep_every > 0 and self.keep_every % self.every == 0),
            f"keep_every must be a multiple of every, {self.every}, or null, got {self.keep_every}",
        )
        check_locations(folder=self.folder)


@dataclass
class TrainConfig:
    """One training run. `run` is the folder for everything it writes; `stage` decides which subclass is read.

    `stage` is a name of `training.stage_names`, or the dotted path of a class.
    """

    stage: str = "flow"
    run: str = "runs/train"
    init: str | None = None  # a diffusers folder or hub name to start from; null: random weights
    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    stopped_code: int = 75  # exit code of a run that SIGTERM ended after saving: not 0, which would count as done
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of matrix products; parameters stay float32
    # Trained parameters: "all", "adapters", or regular expressions of parameters and modules. The rest is frozen, in
    # `precision`.
    trainable: tuple[str, ...] = ("all",)
    validation: ValidationConfig | None = None
    wandb: str | None = None  # project of Weights & Biases that gets the metrics, too; needs `pip install wandb`
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        require(self.steps > 0, f"steps must be at least 1, got {self.steps}")
        require(self.log_every > 0, f"log_every must be at least 1, got {self.log_every}")
        require(0 <= self.stopped_code < 256, f"stopped_code must be from 0 to 255, got {self.stopped_code}")
        require(bool(self.run), "run must name a folder")
        check_locations(run=self.run, init=self.init)
        checkpoints = self.checkpoint.folder or self.run
        # Orbax takes paths of other buckets for local folders.
        require(
            not is_remote(checkpoints) or checkpoints.startswith("gs://"),
            f"checkpoint.folder: {checkpoints} cannot hold checkpoints; name a folder of gs://, or a local one",
        )
        check_seed(self.seed)
        require(bool(self.trainable), "trainable must name something: all, adapters or parameters")
        for name in self.trainable:
            try:
                re.compile(f"(?:{name})")  # as `training.trainable` uses it
            except re.error as error:
                raise ValueError(f"trainable: {name!r} is no regular expression ({error})") from None
        parts = self.optim.accumulate
        require(
            self.data.batch_size % parts == 0,
            f"data.batch_size {self.data.batch_size} must be a multiple of optim.accumulate {parts}",
        )
