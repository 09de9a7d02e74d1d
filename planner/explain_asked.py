"""An alternative that someone names: "tp=8,weights=bf16". What it says, what of it the request forbids, and
the variation of the request that leaves no other choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from planc.cost_model import catalogue
from planc.cost_model.formats import fmt
from planc.cost_model.shape import EngineShape
from planc.errors import InvalidField
from planc.planner.check import shape_of
from planc.planner.formats import accuracy_drop
from planc.planner.plan import Plan, Replica
from planc.planner.settings import parsed
from planc.planner.variations import Outcome, Resolver, Variation

#: setting of a replica -> the list of `Constraints` that fixes it
_LISTS = {
    **{name: name for name in ("tp", "pp", "dp", "ep", "cp", "weights", "activations", "kv")},
    **{name: name for name in ("max_num_seqs", "max_num_batched_tokens", "serving")},
    "gpu": "gpus",
    "engine": "engines",
}
_SERVING = ("aggregated", "disaggregated")


def asked(text: str) -> dict[str, Any]:
    """Decisions written as "tp=8,weights=bf16". Raises InvalidField, UnknownField or UnknownName."""
    raw: dict[str, str] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name or not value:
            raise InvalidField(
                where="explain",
                field="--why-not",
                value=item,
                reason="not of the form NAME=VALUE",
                mend='Write for example --why-not "tp=8,weights=bf16".',
            )
        raw[name] = value
    for name in ("pipeline_layers", "speculative"):
        if name in raw:
            raise InvalidField(
                where="explain",
                field="--why-not",
                value=f"{name}={raw[name]}",
                reason="no constraint of a request names it alone",
                mend=f"See what it does with planc estimate --set {name}=...",
            )
    serving = raw.pop("serving", None)
    found = parsed(raw, "--why-not", also=("serving",))
    for name in ("weights", "activations", "kv"):
        if name in found:
            found[name] = fmt(found[name], field=name).name
    if "gpu" in found:
        found["gpu"] = catalogue.gpu(found["gpu"], field="gpu").name
    if "engine" in found:
        catalogue.engine(found["engine"], field="engine")
    if serving is not None:
        if serving not in _SERVING:
            raise InvalidField(
                where="--why-not",
                field="serving",
                value=serving,
                reason="no way of serving",
                mend=f"Write {' or '.join(_SERVING)}.",
            )
        found["serving"] = serving
    return found


def in_inventory(resolver: Resolver, wanted: Mapping[str, Any]) -> None:
    names = [catalogue.gpu(nodes.gpu).name for nodes in resolver.start.request.inventory.nodes]
    if wanted.get("gpu", names[0]) not in names:
        raise InvalidField(
            where="--why-not",
            field="gpu",
            value=wanted["gpu"],
            reason="not in the inventory",
            mend=f"Use {' or '.join(dict.fromkeys(names))}.",
        )


def is_so(plan: Plan, wanted: Mapping[str, Any]) -> bool:
    replicas = plan.replicas()
    if "serving" in wanted:
        apart = any(pool.role == "prefill" for pool in plan.pools)
        if apart != (wanted["serving"] == "disaggregated"):
            return False
    if wanted.get("replicas", len(replicas)) != len(replicas):
        return False
    names = [name for name in wanted if name not in ("serving", "replicas")]
    return all(getattr(replica, name) == wanted[name] for replica in replicas for name in names)


def forbidden(resolver: Resolver, base: Outcome, wanted: Mapping[str, Any]) -> list[str]:
    """Constraints of the request that the alternative breaks, in its own words."""
    limits, shape = resolver.start.request.constraints, completed(base.plan.replicas()[0], wanted)
    native = resolver.table.model.native_format
    found = []
    for name, value in wanted.items():
        listed = getattr(limits, _LISTS.get(name, name), None)
        if isinstance(listed, list) and value not in listed:
            found.append(f"constraints.{_LISTS[name]} is {', '.join(map(str, listed))}")
    drop = accuracy_drop(native, shape.weights, shape.activations, shape.kv)
    budget = limits.max_accuracy_drop
    if budget is not None and drop > budget + 1e-12:
        found.append(f"constraints.max_accuracy_drop is {budget:g}, and these formats lose {drop:.3g}")
    narrow = "weights" in wanted and fmt(wanted["weights"]).bits < fmt(native).bits
    if budget is None and limits.weights is None and narrow:
        found.append(f"without constraints.weights the checkpoint's own format is kept, {native}")
    if budget is None and limits.kv is None and "kv" in wanted and fmt(wanted["kv"]).bits < 16:
        found.append("without constraints.kv the cache is not quantized")
    if limits.max_gpus is not None and shape.world > limits.max_gpus:
        found.append(f"constraints.max_gpus is {limits.max_gpus}, and one engine takes {shape.world}")
    return found


def fixed(resolver: Resolver, wanted: Mapping[str, Any], broken: Sequence[str]) -> Variation:
    """The request that allows nothing else, and not what else it forbids of these."""
    changes: dict[str, Any] = {_LISTS[name]: [value] for name, value in wanted.items() if name in _LISTS}
    if "weights" in wanted and "activations" not in wanted:
        changes["activations"] = None
    changes |= {k: wanted[k] for k in ("formats", "gpu_memory_utilization", "max_model_len") if k in wanted}
    for name in ("max_accuracy_drop", "max_gpus"):
        if any(name in words for words in broken):
            changes[name] = None
    return replace(resolver.start.constrained(**changes), layouts="all")


def completed(replica: Replica, wanted: Mapping[str, Any]) -> EngineShape:
    """The plan's first engine with the named decisions in place, and those that follow from them."""
    names = ("engine", "gpu", "tp", "pp", "dp", "ep", "cp", "weights", "activations", "kv")
    shape = replace(shape_of(replica), **{name: wanted[name] for name in names if name in wanted})
    if "formats" in wanted or "weights" in wanted:
        shape = replace(shape, formats=tuple(sorted(wanted.get("formats", {}).items())))
    if "ep" not in wanted and shape.ep > 1:
        shape = replace(shape, ep=shape.tp * shape.dp)
    if "cp" not in wanted:
        shape = replace(shape, cp=math.gcd(shape.cp, shape.tp))
    if "activations" not in wanted:
        pairs = catalogue.engine(shape.engine).pairs(catalogue.gpu(shape.gpu))
        own = [acts for weights, acts in pairs if weights == shape.weights]
        if own and shape.activations not in own:
            shape = replace(shape, activations=shape.weights if shape.weights in own else own[0])
    return shape
