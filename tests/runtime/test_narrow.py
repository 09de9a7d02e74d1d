"""Every published configuration, made narrow, gives the traced model's numbers after the passes."""

from __future__ import annotations

import pytest
import torch

from planc.ir.trace.hf import trace_config
from planc.ir.trace.hf_config import read_config, text_part
from planc.ir.trace.narrow import narrow
from planc.passes.fusion import Fusion
from planc.passes.phases import Phases
from planc.passes.pipeline import FRONT, run
from planc.runtime import weights
from planc.runtime.verify import verify_model
from tests.roof.support import ROOT

CONFIGS = {path.stem: path for path in sorted((ROOT / "examples/models").glob("*.json"))}
FAST = ("qwen3-0.6b", "gpt-oss-20b")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CONFIGS]
)
def test_a_narrow_model_keeps_its_numbers(name: str) -> None:
    traced = trace_config(narrow(read_config(CONFIGS[name])), name, dtype=torch.float32)
    front = run(traced, FRONT)
    phases = [run(front, (Phases(phase), Fusion())) for phase in ("prefill", "decode")]
    found = verify_model(
        traced,
        *phases,
        weights.at_random(traced),
        prompts=[tuple(range(2, 30)), (7, 7, 7), (1,)],
        max_new_tokens=8,
        block_size=4,
        max_num_batched_tokens=16,
    )
    assert found.typical_error <= 1e-4
    assert found.same_tokens is not None
    assert found.same_tokens >= found.compared - 1  # one near tie of random logits at most


@pytest.mark.parametrize("name", CONFIGS)
def test_narrow_keeps_what_a_model_is_made_of(name: str) -> None:
    config = text_part(read_config(CONFIGS[name]))
    small = narrow(read_config(CONFIGS[name]))
    assert set(config) - {"quantization_config"} <= set(small)
    for key in ("layer_types", "mlp_layer_types"):
        if config.get(key):
            assert set(small[key]) == set(config[key])
    assert small["num_hidden_layers"] < config["num_hidden_layers"]
