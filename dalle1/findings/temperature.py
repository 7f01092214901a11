"""Finding: at a temperature of 1/16 the relaxed bound is as good as the true one."""

from __future__ import annotations

from dalle1.findings.base import (
    Arm,
    Curve,
    Finding,
    Measure,
    Measurements,
    Options,
    Prediction,
    Settings,
)
from dalle1.findings.codecs import bounds, measure_codec
from dalle1.findings.dvae_runs import codecs_of, leaves_settings, train_on_leaves
from dalle1.findings.workspace import Workspace
from dalle1.training.schedules import cosine

STEPS = 900


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    end = f"dvae_training.temperature_end={arm.settings['temperature']}"
    return leaves_settings([end], seed, options, STEPS)


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    run, images = train_on_leaves(settings, workspace)
    schedule, points = settings["train"]["dvae_training"], []
    start, end = schedule["temperature_start"], schedule["temperature_end"]
    for step, codec in codecs_of(run, settings["train"]):
        temperature = cosine(step, start, end, schedule["temperature_steps"])
        found = bounds(codec, images, temperature)
        points.append((float(step), found.gap))
    values = {"relaxed": found.relaxed, "true": found.true, "gap": found.gap}
    return Measurements(values | {"psnr": measure_codec(codec, images).psnr}, {"gap": points})


FINDING = Finding(
    name="temperature",
    claim="Annealing the temperature of the relaxation to 1/16 closes the gap between the relaxed "
    "bound and the true one",
    section="section 2.1, appendix A.2",
    paper="tau = 1/16 is enough to close the gap between the relaxed and the true ELB on unseen "
    "images.",
    setting="The paper's dVAE recipe scaled down, without a warm start, on dead leaves. tau goes "
    "from 1 to the arm's value over two thirds of the updates. Bounds are of unseen images, with "
    "beta 1, the relaxed one at the last tau; the true one takes the codes of the same noise.",
    minutes=22,
    arms=tuple(
        Arm(f"tau {text}", f"temperature_end {text}", {"temperature": value})
        for text, value in (("1", 1.0), ("1/2", 0.5), ("1/4", 0.25), ("1/16", 0.0625))
    ),
    measures=(
        Measure("relaxed", "relaxed bound, - ELB in nats a subpixel", 3),
        Measure("true", "true bound, - ELB in nats a subpixel", 3),
        Measure("gap", "gap, nats a subpixel", 4),
        Measure("psnr", "PSNR with codes, dB"),
    ),
    curves=(Curve("gap", "gap, nats a subpixel", log_y=True),),
    predictions=(
        Prediction("gap", "tau 1", "tau 1/16"),
        Prediction("gap", "tau 1/4", "tau 1/16"),
        Prediction("true", "tau 1", "tau 1/16"),
    ),
    reference="tau 1/16",
    settings=_settings,
    run=_run,
)
