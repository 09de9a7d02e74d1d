"""The shape of one engine: what runs where, and in which number formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.formats import fmt, formats
from planc.cost_model.parts import KV, Exceptions, held, module_of, parse, scheme, split, taken
from planc.cost_model.table import CostTable, LayerClass, Row


@dataclass(frozen=True, slots=True)
class EngineShape:
    """One engine instance, before batch limits.

    dp        attention data parallel inside the engine: each of the dp ranks schedules its own batch
    ep        groups of ranks that hold whole experts; the tp*dp/ep ranks of a group divide the width of its
              experts. 1 or tp*dp, or what divides tp*dp in engines that are free in it
    cp        context parallel: cp of the tp ranks, which else would hold copies of the same cache, share its
              tokens. It divides tp and takes no GPUs of its own
    formats   (part, scheme) pairs that differ from `weights`, `activations` and `kv`, as
              `planc.cost_model.parts` writes them: ("decoder:self_attn", "bf16/bf16"); or of one matrix, as
              checkpoints have them: ("decoder:self_attn.o_proj", "nvfp4/nvfp4")
    pipeline_layers   layers of each stage; () is the engine's even split
    copies    slots of every rank for second copies of busy experts, with expert parallelism, beside an even
              share of the experts rounded down
    eager     True: no CUDA graphs
    """

    engine: str
    gpu: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    weights: str = "bf16"
    activations: str = "bf16"
    kv: str = "bf16"
    formats: Exceptions = ()
    pipeline_layers: tuple[int, ...] = ()
    copies: int = 0
    eager: bool = False

    def slots(self, experts: int) -> int:
        """Experts that a group of ranks has room for, second copies included."""
        return experts // self.ep + self.copies

    @property
    def world(self) -> int:
        """GPUs of the instance."""
        return self.tp * self.pp * self.dp

    def scheme(self, row: Row) -> tuple[str, str]:
        """(weights, activations) that a row is meant to take. Its class is one of `parts.split`'s. What names
        its matrix wins over what names the module around it."""
        names = (row.site, module_of(row.site, row.work.family)) if self.formats else ()
        found = (taken(self.formats, row.layer_class, name) for name in names)
        given = next((one for one in found if one), None)
        return (self.weights, self.activations) if given is None else scheme(given)

    def kv_format(self, layer_class: str) -> str:
        """The format of the cache of a class of `parts.split`'s."""
        return (taken(self.formats, layer_class, KV) if self.formats else None) or self.kv

    def schemes(self) -> set[tuple[str, str]]:
        """All (weights, activations) that it has kernels for."""
        return {(self.weights, self.activations)} | {
            scheme(s) for part, s in self.formats if not _cached(part)
        }

    def kv_formats(self) -> set[str]:
        """All formats that its caches have."""
        return {self.kv} | {s for part, s in self.formats if _cached(part)}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a shape cannot run: the field at fault and a sentence."""

    field: str
    reason: str


def refusals(
    shape: EngineShape, table: CostTable, gpu: Gpu, profile: EngineProfile, *, groups: bool = True
) -> list[Refusal]:
    """Every reason why this engine cannot run this model in this shape; [] when it can.

    Looks at degrees against the model's indivisible units, at the engine's parallel forms and at the
    formats it has kernels for on this GPU. Memory is `memory_map`'s question. Without `groups` the
    checkpoint's groups of weights may be smaller than those that its format has here.
    """
    found: list[Refusal] = []
    say = lambda field, reason: found.append(Refusal(field, reason))  # noqa: E731
    degrees: dict[str, Any] = {name: getattr(shape, name) for name in ("tp", "pp", "dp", "ep", "cp")}
    if table.model.kind not in profile.serves:
        say("engine", f"{profile.name} serves no model of kind '{table.model.kind}'")
    for name, degree in degrees.items():
        if degree < 1:
            say(name, f"{name} must be at least 1")
        elif degree > 1 and name not in profile.parallel:
            say(name, f"{profile.name} has no {name} in its profile")
    if found:
        return found
    experts = table.model.experts
    if shape.ep > 1:
        if not experts:
            say("ep", "the model has no routed experts")
        elif shape.ep != shape.tp * shape.dp and profile.ep_degrees == "tp_dp":
            say(
                "ep", f"{profile.name} spreads experts over tp*dp = {shape.tp * shape.dp} ranks or not at all"
            )
        elif shape.tp * shape.dp % shape.ep:
            say("ep", f"tp*dp = {shape.tp * shape.dp} ranks do not divide into {shape.ep} groups")
        elif experts % shape.ep and not shape.copies:
            say("ep", f"{experts} experts do not divide by {shape.ep}")
    found.extend(_spread_refusals(shape, table, gpu, profile))
    if shape.copies and (shape.ep == 1 or shape.copies + experts // shape.ep > experts):
        say("copies", "second copies need ranks that hold whole experts, and not all of them")
    if shape.pp > table.model.layers:
        say("pp", f"{shape.pp} stages for {table.model.layers} layers")
    if shape.pipeline_layers and (
        len(shape.pipeline_layers) != shape.pp or sum(shape.pipeline_layers) != table.model.layers
    ):
        say("pipeline_layers", f"must be {shape.pp} numbers that sum to {table.model.layers}")
    for site, kind, units, degree in sorted(_divisions(table, shape)):
        if degree > 1 and units % degree and not _replicates(table, units, degree):
            say(
                "ep" if kind == "experts" and shape.ep > 1 else "tp",
                f"{site}: {units} units do not divide by {degree}",
            )
    found.extend(_format_refusals(table, shape, groups))
    for cls in table.classes:
        if cls.kv_units and cls.kv_units % shape.tp and shape.tp % cls.kv_units:
            say("tp", f"{cls.name}: {cls.kv_units} KV heads neither divide by nor into {shape.tp}")
    support = profile.support(gpu)
    if support is None:
        say("gpu", f"{profile.name} does not run on {gpu.arch}")
        return found
    for weights, activations in sorted(shape.schemes()):
        if (weights, activations) not in support.linear:
            say("weights", f"{profile.name} has no {weights} x {activations} kernels on {gpu.arch}")
    for kv in sorted(shape.kv_formats()):
        if kv not in support.kv:
            say("kv", f"{profile.name} has no {kv} cache on {gpu.arch}")
    return found


def handover_refusals(
    shape: EngineShape, table: CostTable, profile: EngineProfile, role: str
) -> list[Refusal]:
    """Why an engine cannot be one of a prefill or a decode pool; [] when it can, or in any other role."""
    context = profile.context_parallel
    if shape.cp > 1 and context is not None and role not in context.roles:
        return [Refusal("cp", f"{profile.name} spreads no cache over ranks in {_pool(role)}")]
    if role not in ("prefill", "decode"):
        return []
    if shape.cp > 1 and context is not None:
        if not {_cache_kind(cls, table) for cls in table.classes if cls.kv_elements} <= set(context.handover):
            return [Refusal("cp", f"{profile.name} hands over no such cache that is spread over ranks")]
        if context.whole and shape.cp != shape.tp:
            return [Refusal("cp", f"{profile.name} hands over caches spread over all tp ranks or none")]
    stages = profile.serving.handover_pp
    if stages is None:
        return [Refusal("serving", f"{profile.name} does not keep prefill and decode apart")]
    if shape.pp > 1 and role not in stages:
        return [Refusal("pp", f"{profile.name} hands no cache to or from pipeline stages in a {role} pool")]
    if shape.pp > 1 and len({cls.kv_span for cls in table.classes if cls.kv_elements}) > 1:
        return [Refusal("pp", f"{profile.name} hands over caches of unlike layers from one stage only")]
    return []


def _spread_refusals(shape: EngineShape, table: CostTable, gpu: Gpu, profile: EngineProfile) -> list[Refusal]:
    """Why the tokens of the cache cannot be spread over cp ranks: each needs copies to begin with."""
    context = profile.context_parallel
    if shape.cp == 1:
        return []
    if context is None or gpu.vendor == "cpu":
        return [Refusal("cp", f"{profile.name} spreads no cache over ranks on {gpu.arch}")]
    if shape.tp % shape.cp:
        return [Refusal("cp", f"tp = {shape.tp} ranks do not divide into groups of {shape.cp}")]
    for cls in table.classes:
        if cls.state_elements:
            return [Refusal("cp", f"{cls.name}: recurrent states have no tokens to spread")]
        if not cls.kv_elements:
            continue
        kind = _cache_kind(cls, table)
        if cls.kv_span != "full" or kind is None:
            return [Refusal("cp", f"{cls.name}: only caches of which all tokens are attended to are spread")]
        if kind not in context.caches:
            return [Refusal("cp", f"{profile.name} spreads no cache of {kind}")]
        if kind == "heads" and (copies := max(shape.tp // cls.kv_units, 1)) % shape.cp:
            have = f"{cls.name}: {cls.kv_units} KV heads have {copies if copies > 1 else 'no'} copies"
            return [Refusal("cp", f"{have} on {shape.tp} ranks, for {shape.cp} to share their tokens")]
    return []


def _cache_kind(cls: LayerClass, table: CostTable) -> str | None:
    """ "latent" or "heads"; None where sparse attention reads a part of the cache, or nothing does."""
    kinds = set()
    for row in table.rows.get("decode", ()):
        if row.layer_class == cls.name and row.work.family == "attention":
            if set(row.work.kv_reads.terms) != {"K:full"}:
                return None
            kinds.add("latent" if row.work.dims.get("latent") else "heads")
    return kinds.pop() if len(kinds) == 1 else None


def _pool(role: str) -> str:
    return "pools that do both halves" if role == "aggregated" else f"{role} pools"


def _format_refusals(table: CostTable, shape: EngineShape, groups: bool) -> list[Refusal]:
    """Formats that this model, cut in this way, cannot take. Names that are no formats are left to others."""
    if any(weights not in formats() for weights, _ in shape.schemes()):
        return []
    known = formats()[shape.weights]
    if set(known.families) == {"grouped_gemm"} and not table.model.experts:
        return [Refusal("weights", f"{shape.weights} is a format of routed experts, and the model has none")]
    unknown = _no_parts(table, shape)
    if unknown:
        return [Refusal("formats", reason) for reason in unknown]
    if not groups or not any(fmt(weights).group for weights, _ in shape.schemes()):
        return []
    ranks = {"row": shape.tp, "experts": shape.tp * shape.dp // shape.ep}
    for row in split(table, shape.formats).rows.get("prefill", ()):
        work, degree = row.work, ranks.get(row.shard.kind, 1)
        weights, _ = shape.scheme(row)
        group = fmt(weights).group
        inner = work.dims.get("k", 0) if work.family == "gemm" else work.dims.get("n", 0) // 2
        if degree > 1 and group and "weight" in row.quantizable and inner / degree % group:
            site = f"{row.layer_class}.{row.site}"
            reason = f"{site}: {inner} over {degree} ranks splits {weights}'s groups of {group}"
            return [Refusal("weights", reason)]
    return []


def _no_parts(table: CostTable, shape: EngineShape) -> list[str]:
    """Exceptions that name no part of the model, or layers that its class has not."""
    if not shape.formats:
        return []
    known = {(part.layer_class, part.module) for part in held(table)}
    matrices = {
        (r.layer_class, r.site) for rows in table.rows.values() for r in rows if "weight" in r.quantizable
    }
    layers = {cls.name: set(cls.layers) for cls in table.classes}
    found = []
    for text, _ in shape.formats:
        part = parse(text)
        if part is None or (part.layer_class, part.module) not in known | matrices:
            names = ", ".join(f"{layer_class}:{module}" for layer_class, module in sorted(known))
            found.append(f"'{text}' is no part of the model, which has {names}")
        elif not layers[part.layer_class].issuperset(part.layers):
            found.append(f"'{text}' names layers that are not of its class")
    return found


def _cached(part: str) -> bool:
    return part.endswith(f":{KV}")


def _divisions(table: CostTable, shape: EngineShape) -> set[tuple[str, str, int, int]]:
    """(site, kind, units, degree) of every divided row; of experts what divides their width."""
    found: set[tuple[str, str, int, int]] = set()
    for rows in table.rows.values():
        for row in rows:
            kind, units, degree = row.shard.kind, row.shard.units, shape.tp
            if kind == "vocab" or row.layer_class == "head":
                continue  # engines pad the vocabulary
            if kind == "experts":
                degree = shape.tp * shape.dp // shape.ep
            if kind != "replicated" and units:
                found.add((f"{row.layer_class}.{row.site}", kind, units, degree))
    return found


def _replicates(table: CostTable, units: int, degree: int) -> bool:
    """KV heads are held by several ranks where the degree is a multiple of their number."""
    return degree % units == 0 and any(cls.kv_units == units for cls in table.classes)
