"""A stage that learns a random linear map in milliseconds: the loop is tested with it, not with a network of ours."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from helios_jax.models.layers import Linear
from helios_jax.sharding import batch_rows, gather
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage import Player, Stage, host_batches

WIDTH = 16


class Net(nnx.Module):
    """Two matrices with the axis names of a feed-forward block."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.up = Linear(WIDTH, 4 * WIDTH, axes=("embed", "mlp"), rngs=rngs)
        self.down = nnx.List([Linear(4 * WIDTH, WIDTH, axes=("mlp", "embed"), rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down[0](jax.nn.gelu(self.up(x)))


class Batches:
    """Batch i is drawn from (seed, i); the position is plain JSON, as that of the real loader."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.index = config, 0
        self.rows = batch_rows(config.data.batch_size, mesh)

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng((self.config.data.seed, self.index))
        x = rng.normal(size=(self.config.data.batch_size, WIDTH)).astype(np.float32)
        self.index += 1
        time.sleep(float(os.environ.get("DUMMY_SECONDS", 0)))
        ids = np.array([f"clip {self.index}.{i}" for i in range(len(x))])
        if self.index == int(os.environ.get("DUMMY_POISON", -1)):
            x[0, 0] = np.nan
        if self.index == int(os.environ.get("DUMMY_SIGNAL_AT", -1)):
            os.kill(os.getpid(), int(os.environ["DUMMY_SIGNAL"]))
        return {"x": x[self.rows], "id": ids[self.rows]}

    def get_state(self):
        return {"next_index": self.index}

    def set_state(self, state):
        self.index = state["next_index"]


class Dummy(Stage[TrainConfig, Net]):
    """The stage; its config is the common one."""

    def init(self, key: jax.Array) -> Net:
        return Net(rngs=nnx.Rngs(key))

    def batches(self, mesh: Mesh) -> Batches:
        return Batches(self.config, mesh)

    def loss(self, model: Net, batch, keys: jax.Array):
        noise = 0.1 * jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
        error = jnp.square(model(batch["x"] + noise) - jnp.roll(batch["x"], 1, -1))
        positive = batch["x"][:, 0] > 0
        half = ((error.mean(1) * positive).sum(), positive.sum())
        return error.mean(), {"noise": noise.mean(), "loss_positive": half}

    def validate(self, model: Net, folder: Path, stop: Callable[[], bool]) -> dict[str, np.ndarray]:
        model = gather(model)
        if jax.process_index() == 0:
            folder.mkdir(parents=True)
            with (folder / "weight.npy").open("wb") as file:
                np.save(file, np.asarray(model.up.weight[...]))
        return {"weight": np.zeros((4, 4, 3), np.uint8)}

    def export(self, model: Net, folder: Path) -> None:
        model = gather(model)
        if jax.process_index() == 0:
            with (folder / "weight.npy").open("wb") as file:
                np.save(file, np.asarray(model.up.weight[...]))


class Duel(Dummy):
    """The stage with a player for each matrix: together they do what one does."""

    def players(self) -> tuple[Player, Player]:
        def first(path, variable) -> bool:
            return path[0] == "up"

        return Player(self.loss, first), Player(self.loss, lambda *of: not first(*of))


class Loaded(Dummy):
    """The stage with the real loader, over records that are made as they are read."""

    def batches(self, mesh: Mesh):
        def draw(example, rng: np.random.Generator):
            if example["number"] == int(os.environ.get("DUMMY_DAMAGED", -1)):
                raise ValueError("it is odd")
            x = np.full(WIDTH, example["number"], np.float32) / 64 + rng.normal(size=WIDTH).astype(np.float32)
            return {"x": x, "id": f"clip {example['number']}"}

        logging.getLogger("helios_jax.tests").info("64 records")
        return host_batches(Records(), draw, self.config.data, mesh)


class Records:
    """64 records."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int):
        return {"number": int(number)}

    def __repr__(self) -> str:
        return "data/x[train]"
