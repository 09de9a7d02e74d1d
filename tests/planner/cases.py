"""Small requests for the planner's tests; tables come from `sample_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from planc.cost_model.table import CostTable
from planc.planner.compile import plan
from planc.planner.offers import Fleet
from planc.planner.plan import Plan
from planc.planner.referee import Judgement, Verdict
from planc.planner.request import Request, make_request
from planc.planner.search import Search
from tests import sample_tables


@cache
def table(name: str = "llama8b") -> CostTable:
    found: CostTable = getattr(sample_tables, name)()
    return found


def raw(**changes: Any) -> dict[str, Any]:
    """A request for Llama-3.1-8B on four L40S cards, as a mapping; `changes` replace top-level parts."""
    base: dict[str, Any] = {
        "model": "llama-3.1-8b.json",
        "inventory": {"nodes": [{"gpu": "l40s", "gpus_per_node": 4, "usd_per_gpu_hour": 1.0}]},
        "workload": {"isl": 1000, "osl": 200, "request_rate": 2},
        "slo": {"ttft_p99_ms": 3000, "tpot_mean_ms": 60},
        "constraints": {
            "weights": ["bf16", "fp8"],
            "max_num_seqs": [32, 128],
            "max_num_batched_tokens": [2048, 8192],
        },
    }
    return {**base, **changes}


def request(**changes: Any) -> Request:
    return make_request(raw(**changes))


@cache
def _planned(text: str, name: str) -> Plan:
    import json

    return plan(make_request(json.loads(text)), table(name))


def planned(name: str = "llama8b", **changes: Any) -> Plan:
    """The plan of a request, made once."""
    import json

    return _planned(json.dumps(raw(**changes), sort_keys=True), name)


class Strict:
    """A referee that lets no engine carry more than `share` of what formulas give it."""

    def __init__(self, share: float) -> None:
        self.share, self.asked = share, 0

    def judge(self, search: Search, fleet: Fleet) -> Judgement:
        self.asked += 1
        verdicts = []
        for item in fleet.items:
            assert item.stream is not None
            offer = next(o for o in item.stream.offers if o.engine is item.engine)
            whole = offer.precise().capacity / item.stream.allowed(item.engine)
            within = item.load <= self.share * whole
            verdicts.append(Verdict((item,), {}, within, 1.0 if within else 1.2, () if within else (item,)))
        latencies: Mapping[str, Mapping[str, float]] = {}
        return Judgement(tuple(verdicts), latencies)
