"""Every published configuration under examples/models gets a plan for eight H200s, or a true refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from planc import api
from planc.errors import Infeasible
from planc.planner.plan import Plan
from tests.roof.support import ROOT, write_request

MODELS = sorted(path.stem for path in (ROOT / "examples/models").glob("*.json"))

#: Published parameter counts, in billions (text part), from the models' cards and reports.
PUBLISHED = {
    "deepseek-r1": 671.03,
    "llama-3.1-405b": 405.85,
    "llama-3.1-70b": 70.55,
    "llama-3.1-8b": 8.03,
    "mixtral-8x7b": 46.70,
    "qwen3-0.6b": 0.596,
    "qwen3-235b-a22b": 235.09,
    "qwen3-30b-a3b": 30.53,
    "qwen3-32b": 32.76,
    "qwen3-8b": 8.19,
    "gpt-oss-120b": 116.83,
    "gpt-oss-20b": 20.91,
}

#: What does not fit into 8 x 139.8 GiB in its published format: 743.9 B parameters in bf16.
TOO_LARGE = {"glm-5"}


def plan_for(model: str, folder: Path) -> Plan:
    request = write_request(
        folder,
        model=str(ROOT / f"examples/models/{model}.json"),
        inventory={"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 8, "count": 1}]},
        workload={"isl": 1000, "osl": 500, "request_rate": 1},
        slo={"ttft_p99_ms": 10000, "tpot_mean_ms": 100},
    )
    return api.compile(request)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_on_eight_h200s(model: str, tmp_path: Path) -> None:
    if model in TOO_LARGE:
        with pytest.raises(Infeasible):
            plan_for(model, tmp_path)
        return
    plan = plan_for(model, tmp_path)
    assert plan.solver.status == "optimal"
    for replica in plan.replicas():
        assert replica.memory.total_gib <= replica.memory.capacity_gib
    if model in PUBLISHED:
        assert plan.model.parameters / 1e9 == pytest.approx(PUBLISHED[model], rel=0.005)
