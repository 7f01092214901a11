"""The plan as tables for people; a GB is 1e9 bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dalle1.training.planning.plan import Plan

GB = 1e9
DAY = 86400  # seconds
MEMORY = {
    "weights": "weights",
    "master": "weights, ZeRO's copy",
    "gradients": "gradients",
    "moments": "moments",
    "errors": "PowerSGD's buffers",
    "gathered": "weights gathered (ZeRO 3)",
    "frozen": "frozen codec or LPIPS",
    "activations": "activations kept",
    "block": "a block's backward pass",
    "copies": "weights in 16 bits",
    "logits": "logits and heads' gradients",
    "reserve": "buffers, context (allowance)",
}


def describe(plan: Plan) -> str:
    """The plan in words and tables, one block for each question."""
    blocks = (_run, _parameters, _memory, _cpu, _messages, _step, _time)
    lines = [line for block in blocks for line in block(plan)]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _run(plan: Plan) -> list[str]:
    config, cluster = plan.config, plan.cluster
    return [
        f"{config.run}: stage {config.stage} in {config.parallel.precision} on "
        f"{_counted(cluster.gpus, 'GPU')}, {_counted(cluster.nodes, 'node')}",
        f"ZeRO {config.parallel.zero_stage}: {_counted(plan.dp_replicate, 'replica')} of the "
        f"state, each on {_counted(plan.dp_shard, 'GPU')}",
        f"batch {config.batch_size:,} = {_counted(cluster.gpus, 'GPU')} x {plan.micro_batch:,} x "
        f"{plan.grad_accum_steps:,} a step",
    ]


def _parameters(plan: Plan) -> list[str]:
    total = sum(plan.parameters.values())
    return _table("parameters", [*plan.parameters.items(), ("total", total)], ",")


def _memory(plan: Plan) -> list[str]:
    used = [(MEMORY[name], value / GB) for name, value in asdict(plan.memory).items() if value]
    rows = [*used, ("total", plan.memory.total / GB)]
    answer = "does NOT fit"
    if plan.fits:
        answer = "fits" if plan.fits_well else "fits, but barely"
    if plan.remedy:
        answer += f": {plan.remedy}"
    return [
        *_table("memory of a GPU, GB", rows, ",.2f"),
        f"  of {plan.cluster.memory:g}: {answer}",
    ]


def _cpu(plan: Plan) -> list[str]:
    rows = [(name, value / GB) for name, value in plan.cpu.items()]
    return _table("memory of a rank's CPU, GB", rows, ",.2f")


def _messages(plan: Plan) -> list[str]:
    sent = [(t.name, t.gpu / GB, t.node / GB) for t in plan.transfers if t.gpu]
    total = ("total", sum(row[1] for row in sent), sum(row[2] for row in sent))
    return _table("sent a step, GB: by a GPU, by a node to others", [*sent, total], ",.2f")


def _step(plan: Plan) -> list[str]:
    rows = [("tokens", plan.tokens), ("FLOPs of the model", plan.flops)]
    if plan.recomputed_flops:
        rows.append(("FLOPs of recomputation", plan.recomputed_flops))
    return _table("a step", rows, ",.4g")


def _time(plan: Plan) -> list[str]:
    cluster, steps = plan.cluster, plan.config.steps
    times = {
        "products": plan.seconds,
        "network": plan.network_seconds,
        "both, if nothing overlaps": plan.seconds + plan.network_seconds,
    }
    rows = [(name, seconds, seconds * steps / DAY) for name, seconds in times.items()]
    mfu = cluster.mfu * plan.flops / (plan.flops + plan.recomputed_flops)
    return [
        *_table(f"time: seconds a step, days of {steps:,} steps", rows, ",.4g"),
        f"  at {cluster.mfu:.0%} of {cluster.peak:g} TFLOP/s ({mfu:.0%} MFU without recomputation) "
        f"and {cluster.network:g} Gbit/s a node",
    ]


def _table(title: str, rows: Iterable[Sequence[Any]], style: str) -> list[str]:
    """A title, and a line for each row of a name and numbers."""
    lines = (f"  {name:30}" + "".join(f"{v:>18{style}}" for v in values) for name, *values in rows)
    return [title, *lines]


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + "s" * (number != 1)
