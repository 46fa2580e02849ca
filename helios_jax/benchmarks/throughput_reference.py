"""diffusers' pipeline with the weights of ours, timed part by part: what the throughput benchmark compares with.

On a GPU torch computes with our arrays in place, through DLPack: both sides fit where one does. On a CPU it has copies
in its own layout.
"""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from flax import nnx

from helios_jax.benchmarks.throughput_model import PROMPT, TOKENIZER, Size
from helios_jax.models.transformer import SCALES, FrameIndices, HistoryLatents
from helios_jax.pretrained.layout import file_entries
from helios_jax.sampling.pipeline import HeliosPipeline

NEEDED = ("torch", "diffusers", "transformers")
INSTALL = 'pip install torch "diffusers==0.42.1" "transformers==5.23.0"'


class Reference:
    """diffusers' `HeliosPyramidPipeline` of the same `size` as `ours`, which must not be stacked.

    Raises ModuleNotFoundError, in one line, when a package is missing, and ValueError when torch has no GPU though jax
    does.
    """

    def __init__(self, ours: HeliosPipeline, size: Size):
        try:
            import diffusers
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"the reference needs {error.name}, which is not installed: {INSTALL}") from None
        self._torch, self.size = torch, size
        self.versions = {name: version(name) for name in NEEDED}
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        if self.device == "cuda" and not (jax.default_backend() == "gpu" and torch.cuda.is_available()):
            raise ValueError(f"torch {torch.__version__} cannot use this accelerator: install its CUDA build")

        def config(values: Any) -> dict[str, Any]:
            return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(values).items()}

        with torch.device("meta"):
            transformer = diffusers.HeliosTransformer3DModel(**config(size.transformer))
            vae = diffusers.AutoencoderKLWan(**config(size.vae))
            text = transformers.UMT5EncoderModel(transformers.UMT5Config(**config(size.text_encoder)))
        # The one module with arrays that are no parameters.
        transformer.rope = type(transformer.rope)(size.transformer.rope_dim, size.transformer.rope_theta).to(
            self.device
        )
        for theirs, mine in ((transformer, ours.transformer), (vae, ours.vae), (text, ours.text_encoder)):
            self._fill(theirs, mine)
        self.pipe = diffusers.HeliosPyramidPipeline(
            tokenizer=transformers.AutoTokenizer.from_pretrained(TOKENIZER),
            text_encoder=text,
            vae=vae,
            transformer=transformer,
            scheduler=diffusers.HeliosDMDScheduler(use_dynamic_shifting=True),
            is_distilled=True,
        )
        self.pipe.set_progress_bar_config(disable=True)

    def _fill(self, theirs: Any, ours: nnx.Module) -> None:
        """Sets every parameter of `theirs` to the values of `ours`."""
        torch, values = self._torch, dict(nnx.to_flat_state(nnx.state(ours, nnx.Param)))
        state = {}
        for key, entry in file_entries(ours).items():
            x = torch.from_dlpack(values[entry.path][...])
            if entry.layout == "linear":
                x = x.T
            elif entry.layout == "conv":
                x = x.permute(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
            elif entry.layout != "same":
                x = x.reshape(entry.shape)
            # cuBLAS takes a transposed matrix as it is; convolutions would copy it at every call.
            state[key] = x.contiguous() if self.device == "cpu" or x.ndim > 2 else x
        for repeated, key in getattr(type(ours), "TIED", {}).items():
            if repeated in theirs.state_dict() and key in state:
                state[repeated] = state[key]
        theirs.load_state_dict(state, strict=True, assign=True)
        theirs.eval().requires_grad_(False)

    def compile(self) -> None:
        """Compiles the transformer and the VAE's decoder by torch.compile; the first calls of each shape are slow."""
        self.pipe.transformer.compile(dynamic=False)
        self.pipe.vae.decoder.compile(dynamic=False)

    def sync(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            self._torch.cuda.synchronize()

    def threads(self, count: int | None = None) -> int:
        """The CPU threads of torch; sets them when given."""
        if count is not None:
            self._torch.set_num_threads(count)
        return self._torch.get_num_threads()

    def run(self, steps: list[int], chunks: int) -> float:
        """Seconds of a whole call: text, denoising, VAE; frames stay on the device."""
        begin = time.perf_counter()
        with self._torch.no_grad(), _block_noise(self._torch):
            self.pipe(
                PROMPT,
                height=self.size.height,
                width=self.size.width,
                num_frames=33 * chunks,
                pyramid_num_inference_steps_list=steps,
                guidance_scale=1.0,
                output_type="pt",
            )
        self.sync()
        return time.perf_counter() - begin

    def parts(self, steps: list[int]) -> dict[str, float]:
        """Seconds of the text encoder, of a transformer pass at each height in latents, and of the VAE's decoding,
        each waited for, in a call of one chunk."""
        seen: defaultdict[str, list[float]] = defaultdict(list)
        pipe = self.pipe
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._timed(pipe.text_encoder, "forward", lambda _: "text", seen))
            height = lambda named: f"pass {named['hidden_states'].shape[-2]}"  # noqa: E731
            stack.enter_context(self._timed(pipe.transformer, "forward", height, seen))
            stack.enter_context(self._timed(pipe.vae, "decode", lambda _: "decode", seen))
            self.run(steps, 1)
        return {name: float(np.median(values)) for name, values in seen.items()}

    @contextlib.contextmanager
    def _timed(self, module: Any, method: str, name: Any, seen: dict[str, list[float]]) -> Iterator[None]:
        original = getattr(module, method)

        def call(*args: Any, **named: Any) -> Any:
            self.sync()
            begin = time.perf_counter()
            out = original(*args, **named)
            self.sync()
            seen[name(named)].append(time.perf_counter() - begin)
            return out

        setattr(module, method, call)
        try:
            yield
        finally:
            delattr(module, method)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The VAE's video [b, t, h, w, c] of denormalized `latents` [b, t, h, w, c]."""
        torch, vae = self._torch, self.pipe.vae
        x = torch.from_numpy(np.moveaxis(latents, -1, 1).copy()).to(self.device, vae.dtype)
        with torch.no_grad():
            return vae.decode(x).sample.float().movedim(1, -1).cpu().numpy()

    def velocity(
        self, latents: np.ndarray, timestep: float, text: np.ndarray, history: HistoryLatents, indices: FrameIndices
    ) -> np.ndarray:
        """One pass of the transformer, channels last, with what `diffusion.memory.window` gives."""
        torch, model = self._torch, self.pipe.transformer

        def video(x: Any) -> Any:
            return torch.from_numpy(np.moveaxis(np.asarray(x, np.float32), -1, 1).copy()).to(self.device, model.dtype)

        def frames(x: Any) -> Any:
            return torch.from_numpy(np.array(x)).to(self.device)

        with torch.no_grad():
            out = model(
                hidden_states=video(latents),
                timestep=torch.tensor([timestep], device=self.device),
                encoder_hidden_states=torch.from_numpy(np.array(text, np.float32)).to(self.device, model.dtype),
                indices_hidden_states=frames(indices.noisy),
                **{f"indices_latents_history_{part}": frames(getattr(indices, part)) for part in SCALES},
                **{f"latents_history_{part}": video(getattr(history, part)) for part in SCALES},
                return_dict=False,
            )[0]
        return out.float().movedim(1, -1).cpu().numpy()

    def peak_bytes(self) -> int | None:
        """Peak bytes that torch allocated on the GPU, without the weights that it shares with us; None on a CPU."""
        return self._torch.cuda.max_memory_allocated() if self.device == "cuda" else None


@contextlib.contextmanager
def _block_noise(torch: Any) -> Iterator[None]:
    """Patches torch's Cholesky factorization for the singular covariance of the pyramid's block noise.

    Where rounding leaves its last pivot below zero, torch refuses and the pipeline stops. The pivot is then set to the
    value that other CPUs compute.
    """
    original = torch.linalg.cholesky

    def cholesky(matrix: Any) -> Any:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            factor[-1, -1] = (3 * 2.0**-24) ** 0.5
        return factor

    torch.linalg.cholesky = cholesky
    try:
        yield
    finally:
        torch.linalg.cholesky = original
