"""Parts of the parity tests: random torch weights, channel order, the error."""

from collections import defaultdict

import numpy as np
import torch

from tests import closeness

torch.set_num_threads(1)  # for arrays this small, more threads mostly wait for each other
# What `check` has seen, for the report: (error, bar) by what was compared.
MEASURED: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)


def channels_last(x: torch.Tensor) -> np.ndarray:
    """[b, c, t, h, w] -> [b, t, h, w, c]."""
    return x.detach().float().movedim(1, -1).contiguous().numpy()


def channels_first(x: np.ndarray) -> torch.Tensor:
    """[b, t, h, w, c] -> [b, c, t, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fresh weights everywhere, norms and biases included, at a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim <= 1 or name.endswith("gamma"):
                p.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise)
            else:
                p.copy_(noise / max(1, p[0].numel()) ** 0.5)
    return module.eval()


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The module's state under its file keys."""
    return {k: v.detach().float().numpy() for k, v in module.state_dict().items()}


def error(ours, reference) -> float:
    """norm(ours - reference) / norm(reference)."""
    if isinstance(reference, torch.Tensor):
        reference = reference.detach().float().numpy()
    return closeness.error(ours, reference)


def check(what: str, ours, reference, bar: float, where: object = "") -> None:
    """Asserts that the error is at most `bar`, and remembers it."""
    value = error(ours, reference)
    MEASURED[what].append((value, bar))
    assert value <= bar, f"{what}: error {value:.2e} is above {bar:.0e} {where}"


def check_loss(what: str, ours, reference, exact, bar: float = 3) -> None:
    """Asserts that `ours` is at most `bar` times as far from the `exact` result as the `reference` is."""
    value = error(ours, exact) / error(reference, exact)
    MEASURED[f"{what}, distance from float32 over the reference's"].append((value, bar))
    assert value <= bar, f"{what}: {value:.2f} times as far from float32 as the reference, above {bar}"
