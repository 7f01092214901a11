"""The plan in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dalle1.training.planning.plan import COMFORT, Plan

MEMORY = {
    "weights": "weights",
    "master": "weights, ZeRO's copy",
    "gradients": "gradients",
    "moments": "moments",
    "errors": "PowerSGD's buffers",
    "gathered": "weights gathered (ZeRO 3)",
    "frozen": "frozen dVAE",
    "activations": "activations kept",
    "block": "block at work",
    "copies": "weights in 16 bits",
    "logits": "logits and heads' gradients",
    "reserve": "buffers, context (allowance)",
}


def describe(plan: Plan) -> str:
    """The plan as tables for people; GB are 1e9 bytes."""
    config, cluster, gb = plan.config, plan.cluster, 1e9
    lines = [
        f"{config.run}: stage {config.stage} in {config.parallel.precision} on "
        f"{_counted(cluster.gpus, 'GPU')}, {_counted(cluster.nodes, 'node')}",
        f"ZeRO {config.parallel.zero_stage}: {_counted(plan.replicas, 'replica')} of the state, "
        f"each on {_counted(plan.shards, 'GPU')}",
        f"batch {config.batch_size:,} = {_counted(cluster.gpus, 'GPU')} x {plan.micro_batch:,} x "
        f"{plan.accumulate:,} a step",
    ]

    def table(title: str, rows: Iterable[Sequence[Any]], style: str) -> None:
        lines.append(title)
        for name, *values in rows:
            lines.append(f"  {name:30}" + "".join(f"{value:>18{style}}" for value in values))

    count = sum(plan.parameters.values())
    table("parameters", [*plan.parameters.items(), ("total", count)], ",")
    used = [(MEMORY[name], value / gb) for name, value in asdict(plan.memory).items() if value]
    table("memory of a GPU, GB", [*used, ("total", plan.memory.total / gb)], ",.2f")
    tight = plan.memory.total > COMFORT * cluster.memory * gb
    answer = f"fits{', but barely' if tight else ''}" if plan.fits else "does NOT fit"
    answer += f": {plan.remedy}" if plan.remedy else ""
    lines.append(f"  of {cluster.memory:g}: {answer}")
    table("memory of a rank's CPU, GB", [(k, v / gb) for k, v in plan.cpu.items()], ",.2f")
    sent = [(t.name, t.gpu / gb, t.node / gb) for t in plan.transfers if t.gpu]
    sums = ("total", sum(row[1] for row in sent), sum(row[2] for row in sent))
    table("sent a step, GB: by a GPU, by a node to others", [*sent, sums], ",.2f")
    work = [("tokens", plan.tokens), ("FLOPs of the model", plan.flops)]
    work += [("FLOPs of recomputation", plan.flops_again)] if plan.flops_again else []
    table("a step", work, ",.4g")
    days = config.steps / 86400
    times = [("products", plan.seconds), ("network", plan.network_seconds)]
    times.append(("both, if nothing overlaps", plan.seconds + plan.network_seconds))
    rows = [(name, seconds, seconds * days) for name, seconds in times]
    table(f"time: seconds a step, days of {config.steps:,} steps", rows, ",.4g")
    mfu = cluster.mfu * plan.flops / (plan.flops + plan.flops_again)
    lines.append(
        f"  at {cluster.mfu:.0%} of {cluster.peak:g} TFLOP/s ({mfu:.0%} MFU without recomputation) "
        f"and {cluster.network:g} Gbit/s a node"
    )
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + "s" * (number != 1)
