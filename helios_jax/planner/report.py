"""The page of the planner: one config on one machine, and what else would fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from helios_jax.planner import analytic
from helios_jax.planner.analytic import Memory, Work
from helios_jax.planner.cost import PARTS, Cost
from helios_jax.planner.machines import Machine
from helios_jax.planner.search import Candidate
from helios_jax.training.flow_config import PackedPyramidConfig
from helios_jax.training.stages.distill.distill_config import DistillTrainConfig

GB = 1e9


@dataclass(frozen=True)
class Answer:
    """A candidate with its memory and cost: the compiled program's, or estimated where it was not compiled.

    `host` bytes are in the host's memory, `seconds` what the compilation took.
    """

    candidate: Candidate
    memory: Memory
    cost: Cost
    compiled: bool
    host: float = 0.0
    seconds: float = 0.0

    def fits(self, machine: Machine) -> bool:
        return self.memory.peak <= machine.chip.memory


def page(title: str, work: Work, machine: Machine, answer: Answer, others: Sequence[Answer], searched: int) -> str:
    """The whole page."""
    lines = [f"{title} on {machine}", ""]
    lines += [*_verdict(work, machine, answer), "", *_memory(answer), ""]
    lines += [*_time(work, machine, answer), "", *_collectives(answer), ""]
    if others:
        lines += [*_ranking(work, machine, [answer, *others], searched), ""]
    return "\n".join([*lines, *_assumptions(machine, answer)])


def _verdict(work: Work, machine: Machine, answer: Answer) -> list[str]:
    room, peak = machine.chip.memory, answer.memory.peak
    how = f"compiled in {answer.seconds:.0f} s" if answer.compiled else "estimated; nothing was compiled"
    if answer.fits(machine):
        sure = answer.compiled or answer.candidate.fits(machine)
        word = "FITS" if sure else "MAY FIT (estimates are a tenth off; compile it)"
        first = f"{word}: {peak / GB:.1f} of {room / GB:.0f} GB on each chip, {(room - peak) / GB:.1f} GB left ({how})"
    else:
        need = f"it needs {peak / GB:.1f} of {room / GB:.0f} GB on each chip, {(peak - room) / GB:.1f} GB are missing"
        first = f"DOES NOT FIT: {need} ({how})"
    config = answer.candidate.config
    parts = config.optim.accumulate
    each = analytic.samples(config, answer.candidate.mesh)
    return [
        first,
        f"settings: {answer.candidate.overrides}",
        f"a step: {config.data.batch_size} samples of {work.tokens} tokens, in {parts} part{'s' * (parts > 1)} of "
        f"{each} sample{'s' * (each > 1)} a chip",
    ]


def _memory(answer: Answer) -> list[str]:
    memory = answer.memory
    rows = {
        "parameters that are trained": memory.parameters,
        "frozen parameters": memory.frozen,
        "optimiser state": memory.optimizer,
        "average": memory.average,
        "batch": memory.batch,
        "activations, gradients, the rest": memory.temporaries,
    }
    lines = ["memory of each chip, GB"]
    lines += [f"  {name:34}{size / GB:8.2f}" for name, size in rows.items() if size]
    lines.append(f"  {'peak':34}{memory.peak / GB:8.2f}")
    return lines + ([f"  {'in the memory of its host':34}{answer.host / GB:8.2f}"] if answer.host else [])


def _time(work: Work, machine: Machine, answer: Answer) -> list[str]:
    cost, batch = answer.cost, work.config.data.batch_size
    needed = work.model_flops * batch / machine.count
    done = sum(cost.flops.values())
    lines = [
        f"operations of each chip in a step, loops counted: {done / 1e12:.0f} TFLOP in products "
        f"({', '.join(f'{name} {count / 1e12:.0f}' for name, count in sorted(cost.flops.items()))})",
        f"  the model needs {needed / 1e12:.0f}; {100 * (done / needed - 1):.0f}% more is done twice or on padding",
        "seconds of a step            roofline   expected",
    ]
    titles = {name: name for name in PARTS} | {"collectives": "collectives not hidden"}
    lines += [
        f"  {title:26}{cost.bound[name]:9.2f}{cost.expected[name]:11.2f}"
        for name, title in titles.items()
        if cost.bound[name] or cost.expected[name]
    ]
    lines.append(f"  {'all':26}{cost.roofline:9.2f}{cost.seconds:11.2f}")
    for name, show in (
        ("MFU", lambda s: f"{100 * analytic.mfu(work, machine, s):.0f}%"),
        ("tokens/s", lambda s: f"{analytic.tokens_a_second(work, s):.0f}"),
        ("samples/s", lambda s: f"{batch / s:.2f}"),
    ):
        lines.append(f"  {name:26}{show(cost.roofline):>9}{show(cost.seconds):>11}")
    return lines


def _collectives(answer: Answer) -> list[str]:
    cost = answer.cost
    if not cost.received:
        return ["collectives: none"]
    lines = ["collectives of a step          runs   GB received   of which beside other work"]
    for kind, received in sorted(cost.received.items(), key=lambda pair: -pair[1]):
        runs = f"{cost.runs[kind]:.0f}" if cost.runs[kind] else "-"
        lines.append(f"  {kind:22}{runs:>11}{received / GB:14.2f}{cost.overlapped[kind] / GB:29.2f}")
    return lines


def _ranking(work: Work, machine: Machine, answers: Sequence[Answer], searched: int) -> list[str]:
    count = sum(answer.compiled for answer in answers)
    lines = [
        f"{searched} settings were estimated, {count} of these compiled; by expected time:",
        f"  {'':10}{'GB':>7}{'s':>8}{'MFU':>6}  settings",
    ]
    for answer in answers:
        seconds, peak = answer.cost.seconds, f"{answer.memory.peak / GB:.1f}"
        speed = f"{seconds:8.1f}{100 * analytic.mfu(work, machine, seconds):5.0f}%"
        lines.append(
            f"  {'compiled' if answer.compiled else 'estimated':10}{peak:>7}{speed}  {answer.candidate.overrides}"
        )
    return lines


def _assumptions(machine: Machine, answer: Answer) -> list[str]:
    chip = machine.chip
    products, attention, memory = (f"{100 * share:.0f}%" for share in chip.efficiency)
    lines = [
        f"rates: {chip.source}",
        f"expected: products at {products} of the peak, attention at {attention}, memory at {memory} of its bandwidth",
    ]
    if not answer.compiled and isinstance(answer.candidate.config, DistillTrainConfig):
        lines.append("rough: this stage has several passes and models, of which estimates know one; compile it")
    if answer.cost.unknown:
        lines.append("not counted: " + ", ".join(sorted(answer.cost.unknown)))
    return lines


def remedies(machine: Machine, answer: Answer, fitting: Candidate | None) -> str:
    """One line for what does not fit: settings that would, or what else would help."""
    missing = (answer.memory.peak - machine.chip.memory) / GB
    if fitting is not None:
        return f"{missing:.1f} GB of each chip are missing; these settings should fit: {fitting.overrides}"
    pyramid = answer.candidate.config.pyramid
    packed = isinstance(pyramid, PackedPyramidConfig) and pyramid.levels == "packed"
    separate = ", or set flow.pyramid.levels=separate" if packed else ""
    return (
        f"{missing:.1f} GB of each chip are missing and no mesh, accumulation or remat policy would fit; take more "
        f"chips or chips with more memory, or a smaller lora.rank{separate}"
    )
