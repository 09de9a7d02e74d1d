"""A replay as a document: latencies, rates, shares, energy; per pool, per replica and over time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from planc.planner.request import Slo
from planc.runtime.simulator.energy import joules
from planc.runtime.simulator.records import Floats, Records

if TYPE_CHECKING:
    from planc.runtime.simulator.replay import Replay

#: times that the last requests wait longer than the first ones
_OVERLOAD = 5
_LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def document(found: Replay) -> dict[str, Any]:
    """`planc replay --json`. Shares are of 1, energy is in joules; what is not defined is null."""
    records, trace = found.records, found.trace
    limits = per_request(found.slos)
    summary = records.summary(limits)
    end = float(np.nanmax(records.finish_s))
    sites = [_site(found, number, end) for number in range(len(found.sites))]
    energy = sum(site["joules"] for site in sites)
    tokens, count = int(records.output.sum()), records.prompt.size
    time = records.timeline.means(end)
    body = {
        "trace": {
            "file": str(trace.path),
            "format": trace.format,
            "requests": trace.requests,
            "seconds": trace.seconds,
            "mean_prompt": trace.prompt,
            "mean_output": trace.output,
        },
        "router": found.router,
        "seed": found.seed,
        "requests": {
            "read": trace.requests,
            "finished": int(np.isfinite(records.finish_s).sum()),
            "rejected": dict(Counter(item[-1] for item in found.admission.rejected)),
        },
        **{name: summary[name] for name in _LATENCIES},
        "requests_s": summary["requests_s"],
        "output_tok_s": summary["output_tok_s"],
        "prompt_tok_s": summary["prompt_tok_s"],
        "goodput": summary["goodput_requests_s"],
        "goodput_share": summary["goodput_share"],
        "goodput_limits": limits,
        "objectives": {slo.key: _met(slo, records) for slo in found.slos},
        "utilisation": summary["utilisation"],
        "kv_occupancy": {"mean": summary["kv_occupancy"], "max": summary["kv_occupancy_peak"]},
        "preemptions": summary["preemptions"],
        "prefix_hit_rate": summary["prefix_hit_rate"] if trace.shares else None,
        "energy": {
            "joules": energy,
            "joules_per_request": energy / count,
            "joules_per_token": energy / tokens,
        },
        "pools": _pools(sites),
        "replicas": sites,
        "over_time": {
            "seconds": [time["width_s"] * (i + 1) for i in range(len(time["busy"]))],
            **{name: time[name].tolist() for name in ("waiting", "running")},
            "kv_occupancy": time["kv"].tolist(),
            "utilisation": time["busy"].tolist(),
        },
        "notes": _notes(found),
    }
    defined: dict[str, Any] = _defined(body)
    return defined


def _notes(found: Replay) -> list[str]:
    notes = list(found.notes)
    waits, tenth = found.records.ttft_s, max(found.records.prompt.size // 10, 1)
    early, late = float(np.median(waits[:tenth])), float(np.median(waits[-tenth:]))
    if late > _OVERLOAD * max(early, 1.0):
        notes.append(
            f"overloaded: the last tenth waits {late:,.0f} s for its first token, the first tenth "
            f"{early:,.1f} s; a longer trace would wait longer"
        )
    if found.trace.shares and not any(site.plan.prefix_caching for site in found.sites):
        notes.append("the trace's requests share prefixes, but the plan keeps none: prefix_caching is off")
    return notes


def per_request(slos: Sequence[Slo]) -> dict[str, float]:
    """Limits in ms that every single request is held to: the loosest that is stated for its metric."""
    found: dict[str, float] = {}
    for slo in slos:
        if slo.metric in ("ttft", "tpot", "e2e"):
            name = f"{slo.metric}_ms"
            found[name] = max(found.get(name, 0.0), 1e3 * slo.limit)
    return found


def _met(slo: Slo, records: Records) -> dict[str, Any]:
    """Whether the objective holds for the whole run."""
    if slo.metric == "itl":
        gaps = records.gaps
        value = gaps.mean if slo.quantile is None else gaps.quantile(slo.quantile)
    else:
        times: Floats = getattr(records, f"{slo.metric}_s")
        times = times[np.isfinite(times)]
        if not times.size:
            value = math.nan
        else:
            value = float(times.mean() if slo.quantile is None else np.percentile(times, 100 * slo.quantile))
    return {"value": 1e3 * value, "limit": 1e3 * slo.limit, "met": not value > slo.limit}


def _site(found: Replay, number: int, end: float) -> dict[str, Any]:
    site, replica, records = found.sites[number], found.replicas[number], found.records
    time = replica.timeline.means(end)
    edges = np.minimum(np.arange(len(time["busy"]) + 1) * time["width_s"], end)
    mine = found.decoded_by == number if site.role == "decode" else found.served_by == number
    plan = site.plan
    degrees = " ".join(
        f"{n.upper()}{getattr(plan, n)}" for n in ("tp", "pp", "dp", "ep") if getattr(plan, n) > 1
    )
    formats = f"{plan.weights}/{plan.activations}/{plan.kv}"
    return {
        "name": site.name,
        "role": site.role,
        "label": f"{plan.engine} {degrees or 'one GPU'} {plan.gpu} {formats}",
        "gpus": site.gpus,
        "requests": int(np.sum(mine)),
        "output_tokens": int(records.output[mine].sum()) if site.role != "prefill" else int(np.sum(mine)),
        "preemptions": int(records.preemptions[mine].sum()),
        "steps": replica.steps,
        "utilisation": float(np.dot(time["busy"], np.diff(edges)) / end),
        "kv_occupancy": {
            "mean": float(np.dot(time["kv"], np.diff(edges)) / end),
            "max": float(time["kv"].max()),
        },
        "joules": float(joules(site.gpu, site.gpus, time["busy"] * np.diff(edges), edges).sum()),
    }


def _pools(sites: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for role in dict.fromkeys(site["role"] for site in sites):
        mine = [site for site in sites if site["role"] == role]
        gpus = sum(site["gpus"] for site in mine)
        found.append(
            {
                "role": role,
                "replicas": len(mine),
                "gpus": gpus,
                "requests": sum(site["requests"] for site in mine),
                "utilisation": sum(site["utilisation"] * site["gpus"] for site in mine) / gpus,
                "preemptions": sum(site["preemptions"] for site in mine),
                "joules": sum(site["joules"] for site in mine),
            }
        )
    return found


def _defined(node: Any) -> Any:
    if isinstance(node, float) and not math.isfinite(node):
        return None
    if isinstance(node, dict):
        return {key: _defined(item) for key, item in node.items()}
    if isinstance(node, list):
        return [_defined(item) for item in node]
    return node
