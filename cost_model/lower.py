"""From rows of a table to the kernels and collectives of one rank: sharded, fused, deduplicated.

Every number here is linear in step features, so a kernel is a spec and a few coefficient
vectors; `planc.cost_model.step` evaluates all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise

from planc.cost_model import context_parallel
from planc.cost_model.catalogue import EngineProfile, gpu
from planc.cost_model.collectives import Kind as CollectiveKind
from planc.cost_model.formats import fmt
from planc.cost_model.kernels import Attention, Gemm, GroupedGemm, Part
from planc.cost_model.local import activation_format, factors, unquantized, weight_format
from planc.cost_model.routing import ExpertLoad
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable, FusionOffer, Phase, Row
from planc.ir.work import NONE, Amount, Family, total

#: what fp8 weights of a checkpoint with a scale per block are to a kernel
BLOCK_FP8 = "fp8_block"

_BY_PART: tuple[Family, ...] = ("attention", "recurrence")

#: in the path of a module that every token passes beside the routed experts
_SHARED_EXPERT = "shared_expert"

_NORM = "planc::rms_norm"
_SQUARES = 4.0  # bytes of a row's sum of squares


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of one rank: what it does per call, in elements, as amounts over features.

    spec       what the family's cost function needs besides amounts
    rows       m of a GEMM; routed tokens of a grouped one
    launches   kernels per call; 0 when another kernel does this work
    traffic    activation elements per token moved by all ranks together, which is what offers count in
    """

    layer_class: str
    sites: tuple[str, ...]
    op: str
    family: Family
    part: Part
    calls: float
    launches: float
    spec: Gemm | GroupedGemm | Attention | None
    rows: Amount
    flops: Amount
    nbytes: Amount
    kv: Amount
    reads: Amount
    writes: Amount
    traffic: float
    overlapped: bool = False


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective after an op: `size` in bytes, as `collectives.seconds` wants it."""

    layer_class: str
    site: str
    part: Part
    kind: CollectiveKind
    calls: float
    ranks: int
    size: Amount


def kernels(
    table: CostTable, shape: EngineShape, profile: EngineProfile, fusions: frozenset[str] | None
) -> list[Kernel]:
    """All kernels of a layer of each class.

    `fusions` None: those that the engine applies by itself, its compiler's pointwise ones included.
    A set: exactly those, and every other op is a kernel of its own.
    """
    rides = profile.fuses_pointwise and fusions is None
    norms = fusions is None and shape.tp > 1 and gpu(shape.gpu).arch in profile.fused_all_reduce
    blocks = table.model.block_scales
    overlaps = profile.overlaps_shared_experts
    load = table.expert_load
    found = [
        kernel
        for part, row in parts(table)
        for kernel in _merged_over(_kernel_of(row, part, shape, rides, blocks, overlaps, load), row, shape)
    ]
    found = [replace(k, launches=0.0) if norms and _follows_all_reduce(k, table) else k for k in found]
    after_attention = {
        id(two) for one, two in pairwise(found) if isinstance(one.spec, Attention) and _same_class(one, two)
    }
    offers = chosen(table, profile, fusions)
    fused: list[Kernel] = []
    for name in dict.fromkeys(kernel.layer_class for kernel in found):
        mine = [kernel for kernel in found if kernel.layer_class == name]
        fused.extend(_fuse(mine, [offer for offer in offers if offer.layer_class == name]))
    return [
        made
        for kernel in fused
        for made in _with_quantization(kernel, shape, profile, id(kernel) in after_attention)
    ]


def chosen(
    table: CostTable, profile: EngineProfile, fusions: frozenset[str] | None
) -> tuple[FusionOffer, ...]:
    """The offers that are in force."""
    if fusions is not None:
        return tuple(offer for offer in table.fusions if offer.name in fusions)
    return tuple(offer for offer in table.fusions if any(fnmatchcase(offer.name, p) for p in profile.fusions))


def parts(table: CostTable) -> list[tuple[Part, Row]]:
    """Each row once, with the tokens it sees in a step that mixes phases.

    Ops that both phases have run once over all tokens; attention and what only one phase has
    (an absorbed projection, say) run over that phase's tokens. Rows of classes that the table does not
    count are left out: one phase may single out a layer (the last one of a prompt hands on its last
    token only) that is already counted among its like.
    """
    counted = {cls.name for cls in table.classes}
    phases: Sequence[Phase] = ("prefill", "decode")
    keys = {phase: {_key(row) for row in table.rows.get(phase, ())} for phase in phases}
    shared = keys["prefill"] & keys["decode"]
    found: list[tuple[Part, Row]] = []
    for phase in phases:
        for row in table.rows.get(phase, ()):
            if row.work.family in ("view", "link") or row.layer_class not in counted:
                continue
            if _key(row) in shared and row.work.family not in _BY_PART:
                if phase == "prefill":
                    found.append(("step", row))
            else:
                found.append((phase, row))
    return found


def _key(row: Row) -> tuple[str, str, str, int]:
    return row.layer_class, row.site, row.op, row.calls


def _kernel_of(
    row: Row,
    part: Part,
    shape: EngineShape,
    rides: bool,
    blocks: bool,
    overlaps: bool,
    load: ExpertLoad | None,
) -> Kernel:
    work, divided = row.work, factors(row, shape)
    weights, acts = weight_format(row, shape), activation_format(row, shape)
    if blocks and weights == acts == "fp8":
        weights = BLOCK_FP8
    wide = fmt(unquantized(shape)).bytes
    base = Kernel(
        layer_class=row.layer_class,
        sites=(row.site,),
        op=row.op,
        family=work.family,
        part=part,
        calls=float(row.calls),
        launches=0.0 if rides and _is_plain(row) else 1.0,
        spec=None,
        rows=NONE,
        flops=work.flops * divided.flops,
        nbytes=NONE,
        kv=(work.kv_reads + work.kv_writes) * divided.kv,
        reads=work.reads * divided.reads,
        writes=work.writes * divided.writes,
        traffic=_per_token(work.reads + work.writes),
        overlapped=overlaps and _SHARED_EXPERT in row.site,
    )
    weight_bytes = work.weights * divided.weights * fmt(weights).bytes
    if work.family == "gemm" and not (work.weights and {"k", "n"} <= work.dims.keys()):
        return replace(base, spec=Attention("products", part, wide, wide, weight_bytes))
    if work.family == "gemm":
        k, n = work.dims["k"], work.dims["n"]
        rows = work.flops * (1.0 / (2.0 * k * n))
        spec = Gemm(n * divided.n, k * divided.k, weights, acts, wide)
        return replace(base, spec=spec, rows=rows)
    if work.family == "grouped_gemm":
        return _grouped(row, base, shape, weights, acts, load)
    if work.family in ("attention", "recurrence"):
        return _attention(row, base, shape, wide, weight_bytes)
    moved = base.reads + base.writes + base.kv * (fmt(shape.kv_format(row.layer_class)).bytes / wide)
    if work.family != "gather":  # a look-up reads the rows it is asked for, not the table
        moved = moved + Amount({"1": work.weights * divided.weights} if work.weights else {})
    return replace(base, nbytes=moved * wide)


def _follows_all_reduce(kernel: Kernel, table: CostTable) -> bool:
    """The norms of a layer's residual stream: an all-reduce that sums it can apply them."""
    whole = kernel.reads.terms.get("T") == table.model.hidden
    return kernel.op == "planc::rms_norm" and whole and kernel.layer_class != "head"


def _is_plain(row: Row) -> bool:
    """An op of ATen that moves elements: what a compiler fuses with its neighbours."""
    return row.work.family in ("elementwise", "generic") and row.op.startswith("aten::")


def _same_class(one: Kernel, two: Kernel) -> bool:
    return one.layer_class == two.layer_class


def _attention(row: Row, base: Kernel, shape: EngineShape, wide: float, weight_bytes: float) -> Kernel:
    dims, divided = row.work.dims, factors(row, shape)
    if row.work.family == "recurrence":
        state = Amount({"S": 2.0 * dims.get("state_elements", 0) * divided.heads})
        spec = Attention(
            kind="recurrence",
            part=base.part,
            kv_bytes=4.0,
            act_bytes=wide,
            weight_bytes=weight_bytes,
            q_heads=dims.get("heads", 0) * divided.heads,
            token_flops=base.flops.terms.get("T", 0.0),
            key_width=dims.get("state_elements", 0) * divided.heads,
        )
        return replace(base, spec=spec, kv=base.kv or state)
    cp = shape.cp if base.part == "decode" else 1
    flops = context_parallel.gathered(base.flops, cp)
    spans = sorted(name[2:] for name in row.work.kv_reads.terms if name.startswith("K:"))
    spec = Attention(
        kind="attention",
        part=base.part,
        kv_bytes=fmt(shape.kv_format(row.layer_class)).bytes,
        act_bytes=wide,
        weight_bytes=weight_bytes,
        q_heads=dims.get("q_heads", 0) * divided.heads * cp,
        kv_heads=dims.get("kv_heads", 0) * divided.kv,
        qk_dim=dims.get("qk_dim", 0),
        v_dim=dims.get("v_dim", 0),
        latent=bool(dims.get("latent", 0)),
        span=spans[0] if spans else "",
        pair_flops=sum(value for name, value in flops.terms.items() if name.startswith("P:")),
        key_flops=sum(value for name, value in base.flops.terms.items() if name.startswith("K:")),
        token_flops=base.flops.terms.get("T", 0.0),
        key_width=base.kv.terms.get("T", 0.0),
        gathered=cp,
    )
    return replace(base, spec=spec, flops=flops, reads=base.reads * cp, writes=base.writes * cp)


def _grouped(
    row: Row, base: Kernel, shape: EngineShape, weights: str, acts: str, load: ExpertLoad | None
) -> Kernel:
    work = row.work
    dims, experts, top_k = work.dims, work.dims["experts"], work.dims["top_k"]
    flops = work.flops.terms.get("T", 0.0)
    if dims["matrices"] == 1:  # a bare grouped product: its rows are (token, expert) pairs already
        top_k = max(round(flops / (2 * dims["k"] * dims["n"])), 1)
    width = factors(row, shape).n
    spec = GroupedGemm(
        experts=experts / shape.ep + shape.copies,
        total_experts=experts,
        top_k=top_k,
        elements=work.weights * factors(row, shape).weights,
        flops_per_pair=flops / top_k * width,
        hidden=dims["k"],
        inner=dims["n"] / dims["matrices"] * width,
        weights=weights,
        activations=acts,
        ranks=shape.ep,
        load=load,
        copies=shape.copies,
    )
    return replace(base, spec=spec, rows=Amount({"T": float(shape.dp)}))


def _merged_over(kernel: Kernel, row: Row, shape: EngineShape) -> list[Kernel]:
    """An attention kernel, and with context parallelism what weights its partial results."""
    if not isinstance(kernel.spec, Attention) or kernel.spec.gathered == 1:
        return [kernel]
    merge = replace(
        kernel,
        op="merge partial attention",
        family="elementwise",
        spec=None,
        nbytes=context_parallel.merge_bytes(row, shape),
    )
    return [kernel, replace(merge, rows=NONE, flops=NONE, kv=NONE)]


def _with_quantization(
    kernel: Kernel, shape: EngineShape, profile: EngineProfile, after_attention: bool
) -> list[Kernel]:
    """A product and the kernel that quantizes its input, where the engine does not fuse that away.

    Routed experts quantize their own inputs: that is part of what they cost.
    """
    if not isinstance(kernel.spec, Gemm):
        return [kernel]
    acts = kernel.spec.activations
    rides = acts in profile.fused_activation_quant and kernel.spec.weights != BLOCK_FP8
    fused = rides and not after_attention
    if acts == unquantized(shape) or fused:
        return [kernel]
    both = fmt(unquantized(shape)).bytes + fmt(acts).bytes
    quantize = replace(
        kernel,
        op=f"quantize to {acts}",
        family="elementwise",
        spec=None,
        nbytes=kernel.reads * both,
        launches=1.0,
    )
    return [replace(quantize, rows=NONE, flops=NONE, kv=NONE), kernel]


def _fuse(mine: list[Kernel], offers: Sequence[FusionOffer]) -> list[Kernel]:
    """Kernels of one class with the offers applied: groups of sites become one kernel each."""
    group: dict[str, int] = {}
    saved: dict[int, list[FusionOffer]] = {}
    sites = {site for kernel in mine for site in kernel.sites}
    for number, offer in enumerate(offers):
        wanted = [site for site in offer.sites if site in sites]
        if len(wanted) < len(offer.sites):
            continue
        joined = {group[site] for site in wanted if site in group}
        saved[number] = [offer, *(o for old in joined for o in saved.pop(old))]
        for site, old in list(group.items()):
            if old in joined:
                group[site] = number
        group.update(dict.fromkeys(wanted, number))
    out = [kernel for kernel in mine if kernel.sites[0] not in group]
    for number, applied in saved.items():
        out.extend(_one_group([k for k in mine if group.get(k.sites[0]) == number], applied))
    return out


def _one_group(members: list[Kernel], applied: Sequence[FusionOffer]) -> list[Kernel]:
    """GEMMs of equal inner width become one; pointwise kernels share launches and lose saved traffic."""
    gemms = [k for k in members if isinstance(k.spec, Gemm)]
    points = [k for k in members if k.spec is None]
    others = [k for k in members if k.spec is not None and not isinstance(k.spec, Gemm)]
    launches = float(sum(offer.launches for offer in applied))
    gone = sum(_per_token(offer.reads + offer.writes) for offer in applied)
    out = list(others)
    if len(gemms) > 1 and len({_left(k) for k in gemms}) == 1:
        launches -= sum(k.calls for k in gemms) - gemms[0].calls
        gone -= sum(_per_token(k.reads) * k.calls for k in gemms[1:])  # the shared input is read once
        gemms = [_merged(gemms)]
    out.extend(gemms)
    if points:
        # a sum that rides in its neighbour has no launch to save, so only what is left of the offer counts
        each = sum(k.calls for k in points)
        ride = sum(k.calls * k.launches for k in points)
        floor = 0.0 if gemms or others else 1.0
        share = max(min(ride, each - max(launches, 0.0)), floor) / ride if ride else 0.0
        moved = sum(k.traffic * k.calls for k in points)
        kept = min(max(1.0 - gone / moved, 0.0), 1.0) if moved else 1.0
        out.extend(replace(k, launches=k.launches * share, nbytes=k.nbytes * kept) for k in points)
    return out


def _left(kernel: Kernel) -> object:
    """What products must share to be merged along their outputs."""
    assert isinstance(kernel.spec, Gemm)
    return kernel.part, _terms(kernel.rows), kernel.spec.k, kernel.spec.weights, kernel.spec.activations


def _merged(gemms: list[Kernel]) -> Kernel:
    first = gemms[0]
    assert isinstance(first.spec, Gemm)
    width = sum(k.calls * k.spec.n for k in gemms if isinstance(k.spec, Gemm)) / first.calls
    return replace(
        first,
        sites=tuple(site for k in gemms for site in k.sites),
        spec=replace(first.spec, n=width),
        flops=total(k.flops * (k.calls / first.calls) for k in gemms),
        writes=total(k.writes * (k.calls / first.calls) for k in gemms),
    )


def _per_token(amount: Amount) -> float:
    return sum(value for name, value in amount.terms.items() if name in ("T", "S"))


def collectives(
    table: CostTable, shape: EngineShape, *, spread: bool = False, quantized: Sequence[str] = ()
) -> list[Collective]:
    """All collectives of a layer of each class, besides the hand-over between pipeline stages.

    `spread` says that the ranks which share the experts lie on several nodes, `quantized` in which formats
    inputs of experts are gathered instead of in the wide one. A product that is gathered to
    be normalized over its full width is not: engines add up the squares of the ranks' own columns instead.
    """
    found: list[Collective] = []
    wide = fmt(unquantized(shape)).bytes
    rows = parts(table)
    normed = {id(one) for (_, one), (_, two) in pairwise(rows) if two.op == _NORM}
    for part, row in rows:
        make = partial(Collective, row.layer_class, row.site, part, calls=float(row.calls))
        if row.shard.kind == "experts" and shape.dp > 1:
            found.extend(_exchange(make, row, shape, table.model.hidden, wide, spread, quantized))
        if row.work.family == "attention" and shape.cp > 1:
            found.extend(
                Collective(
                    row.layer_class, row.site, one.part, one.kind, float(row.calls), shape.cp, one.size
                )
                for one in context_parallel.exchanges(row, part, shape)
            )
        if not row.shard.collective or shape.tp == 1:
            continue
        if row.shard.collective == "all_gather" and id(row) in normed:
            found.append(make(kind="all_reduce", ranks=shape.tp, size=Amount({"T": _SQUARES})))
        else:
            found.append(make(kind=row.shard.collective, ranks=shape.tp, size=row.shard.moved * wide))
    return found


def _exchange(
    make: Callable[..., Collective],
    row: Row,
    shape: EngineShape,
    width: int,
    wide: float,
    spread: bool,
    quantized: Sequence[str],
) -> list[Collective]:
    """Tokens of all dp ranks to the experts and sums back.

    In a node engines gather all tokens and scatter the sums unless told otherwise (vLLM's
    `allgather_reducescatter`, SGLang's `none`, TensorRT-LLM without an all-to-all). Over nodes whole experts
    want an all-to-all: a token goes once to each rank that has one of its top_k. Ranks that divide an
    expert's width all need its tokens, so they gather.
    """
    hidden, ranks = Amount({"T": float(width)}), shape.tp * shape.dp
    sent = activation_format(row, shape)
    if shape.ep == ranks > 1 and spread:
        copies = ranks * (1.0 - (1.0 - 1.0 / ranks) ** row.work.dims["top_k"]) / shape.tp
        return [
            make(kind="dispatch", ranks=ranks, size=hidden * (copies * fmt(sent).bytes)),
            make(kind="combine", ranks=ranks, size=hidden * (copies * wide)),
        ]
    gathered = fmt(sent).bytes if sent in quantized else wide
    return [
        make(kind="all_gather", ranks=shape.dp, size=hidden * (shape.dp * gathered)),
        make(kind="reduce_scatter", ranks=shape.dp, size=hidden * (shape.dp * wide)),
    ]


def unique(items: Sequence[Kernel]) -> tuple[list[Kernel], list[int]]:
    """Kernels that differ in cost, and for each input the index of the one that stands for it."""
    kept: list[Kernel] = []
    seen: dict[object, int] = {}
    index = []
    for item in items:
        key = (item.family, item.part, item.spec, item.launches, item.overlapped, *_frozen(item))
        if key not in seen:
            seen[key] = len(kept)
            kept.append(item)
        index.append(seen[key])
    return kept, index


def _frozen(item: Kernel) -> list[tuple[tuple[str, float], ...]]:
    amounts: Sequence[Amount] = (item.rows, item.flops, item.nbytes, item.kv, item.reads, item.writes)
    return [_terms(amount) for amount in amounts]


def _terms(amount: Amount) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(amount.terms.items()))


def feature_names(amounts: Sequence[Amount]) -> list[str]:
    """All features that the amounts are written in, besides the constant."""
    names: Mapping[str, None] = {name: None for amount in amounts for name in sorted(amount.features())}
    return list(names)
