"""Files of the metrics' networks, in a folder laid out as the repository HeliosBench-Weights.

    aesthetic_model/ViT-L-14                  CLIP, OpenAI's file or transformers' model.safetensors
    aesthetic_model/sa_0_4_vit_l_14_linear    LAION's linear head
    ViCLIP/ViClip-InternVid-10M-FLT           ViCLIP, and its vocabulary ViCLIP/bpe_simple_vocab_16e6.txt.gz
    amt_model/amt-s                           AMT-S as ONNX or TorchScript (docs/heliosbench.md says how to export it)

Weights are .safetensors or, where torch is installed, .pt and .pth; no pickled code is run.
"""

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.heliosbench.metric import MissingError
from helios_jax.heliosbench.vit import Tensors
from helios_jax.messages import one_line
from helios_jax.pretrained import files
from helios_jax.pretrained.errors import CheckpointError
from helios_jax.pretrained.folder import local
from helios_jax.pretrained.hub import check_hub_name, from_hub

CLIP, HEAD = "aesthetic_model/ViT-L-14", "aesthetic_model/sa_0_4_vit_l_14_linear"
VICLIP, VOCABULARY = "ViCLIP/ViClip-InternVid-10M-FLT", "ViCLIP/bpe_simple_vocab_16e6.txt.gz"
AMT = "amt_model/amt-s"
TORCH = (".pt", ".pth")
WEIGHTS = (".safetensors", *TORCH)

# transformers' names of CLIP's picture encoder, and OpenAI's.
NAMES = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
)
LAYER_NAMES = (
    *((".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".self_attn.", ".attn.")),
    *((".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj.")),
)


def open_folder(name: str) -> Path:
    """The folder of weights: a path, or a hub name whose files are downloaded."""
    folder = local(name)
    if folder.is_dir():
        return folder
    check_hub_name(name)
    from huggingface_hub import snapshot_download

    return Path(from_hub(name, lambda: snapshot_download(name)))


def find(folder: Path | None, stem: str, endings: tuple[str, ...] = WEIGHTS) -> Path:
    """The file of a network; raises MissingError if it is absent, or is one of torch's and torch is absent."""
    if folder is None:
        raise MissingError("no weights: name a folder or BestWishYsh/HeliosBench-Weights by --weights")
    found = [path for ending in endings if (path := folder / f"{stem}{ending}").is_file()]
    if not found:
        names = " or ".join(f"{stem}{ending}" for ending in endings)
        raise MissingError(f"{folder} has no {names}")
    if found[0].suffix in TORCH:
        _torch(found[0])
    return found[0]


def open_weights(path: Path, *prefixes: str) -> dict[str, Callable[[], np.ndarray]]:
    """The tensors of a file by name, read in float32 when they are called; their names begin with one of `prefixes`.

    Raises CheckpointError for a file that cannot be read.
    """
    if path.suffix == ".safetensors":
        tensors = files.read_header(path)[0].items()
        return {key: partial(tensor.read, dtype=np.float32) for key, tensor in tensors if key.startswith(prefixes)}
    torch = _torch(path)
    try:
        if _is_scripted(path):
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything for a damaged file
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}): download it again") from None
    for key in ("model", "state_dict"):
        state = state.get(key, state)
    return {key: partial(_numpy, value) for key, value in state.items() if key.startswith(prefixes)}


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()


def openai_names(tensors: Tensors) -> Tensors:
    """The tensors of CLIP's picture encoder under OpenAI's names, from either's."""
    if not any(key.startswith("vision_model.") for key in tensors):
        return tensors
    named: dict[str, Callable[[], np.ndarray]] = {}
    for key, read in tensors.items():
        for theirs, ours in NAMES:
            if key.startswith(theirs):
                key = ours + key.removeprefix(theirs)
                for old, new in LAYER_NAMES:
                    key = key.replace(old, new)
                named[key] = read
                break
    if "visual_projection.weight" in tensors:
        named["visual.proj"] = lambda: tensors["visual_projection.weight"]().T
    for key in [key for key in named if ".attn.q_proj." in key]:
        parts = [named.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        named[key.replace("q_proj.", "in_proj_")] = partial(_joined, parts)
    return named


def _joined(parts: list[Callable[[], np.ndarray]]) -> np.ndarray:
    return np.concatenate([read() for read in parts])


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise MissingError(f"{path.name} is a file of torch: install torch, or convert it to .safetensors") from None
    return torch


def _is_scripted(path: Path) -> bool:
    """True for a TorchScript archive, such as OpenAI's files: it holds code beside the tensors."""
    return zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())
