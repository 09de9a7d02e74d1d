"""The power limit slows large products of GPUs that cannot feed them, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from planc.cost_model import catalogue, power_limit
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from tests.sample_tables import llama70b


def _slower(gpu: str, tflops: float, precision: catalogue.Precision = "bf16") -> float:
    device = catalogue.gpu(gpu)
    energy = np.array([tflops * 1e12 * power_limit.joules(device, precision)])
    return float(power_limit.slowdown(device, energy, np.ones(1))[0])


def test_gpus_with_power_to_spare_keep_their_clock() -> None:
    assert _slower("rtx_pro_6000", 407) == 1.0
    assert 1.1 < _slower("h100_sxm", 795) < 1.2
    assert _slower("a100_sxm", 285) > _slower("h100_sxm", 795)


def test_narrow_operations_take_less_energy() -> None:
    four, eight, sixteen = (_slower("b200_sxm", 5000, precision) for precision in ("fp4", "fp8", "bf16"))
    assert 1.0 < four < eight < sixteen


def test_a_demand_of_twice_the_limit_takes_a_third_longer() -> None:
    device = catalogue.gpu("h100_sxm")
    twice = np.array([2.0 * (device.tdp_w - device.idle_w)])
    assert power_limit.slowdown(device, twice, np.ones(1)) == pytest.approx(2**0.4)


def test_processors_have_none() -> None:
    assert power_limit.joules(catalogue.gpu("cpu"), "bf16") == 0.0


def test_steps_without_prompts_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = EngineShape("vllm", "h100_sxm", tp=4, weights="fp8", activations="fp8")
    device, engine = catalogue.gpu("h100_sxm"), catalogue.engine("vllm")
    model = StepModel(llama70b(), shape, device, Fabric(8), engine)
    decode, prompt = StepLoad(32, 2000), StepLoad(0, 0, 8192, 1)
    before = float(model.seconds(decode)), float(model.seconds(prompt))
    monkeypatch.setattr(power_limit, "slowdown", lambda gpu, energy, seconds: np.ones_like(seconds))
    without = float(model.seconds(decode)), float(model.seconds(prompt))
    assert before[0] == without[0]
    assert 1.01 < before[1] / without[1] < 1.2
