"""From rows of a table to the kernels of one rank: sharded, in their formats, fused.

Every number here is linear in step features, so a kernel is a spec and a few coefficient
vectors; `planc.cost_model.step` evaluates all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from planc.cost_model import context_parallel
from planc.cost_model.catalogue import EngineProfile, gpu
from planc.cost_model.formats import fmt
from planc.cost_model.fused import chosen, fused
from planc.cost_model.kernels import Attention, Gemm, GroupedGemm, Part
from planc.cost_model.local import activation_format, factors, unquantized, weight_format
from planc.cost_model.rank_ops import Kernel, parts, per_token
from planc.cost_model.routing import ExpertLoad, usual
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable, Row
from planc.ir.work import NONE, Amount

#: what fp8 weights of a checkpoint with a scale per block are to a kernel
BLOCK_FP8 = "fp8_block"

#: operators that choose the experts, and the one with a bias that keeps them balanced
_ROUTE, _BIASED = "planc::route_", "planc::route_grouped"

#: in the path of a module that every token passes beside the routed experts
_SHARED_EXPERT = "shared_expert"


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
    rows = parts(table)
    loads = _loads(table, rows)
    found = [
        kernel
        for part, row in rows
        for kernel in _merged_over(
            _kernel_of(row, part, shape, rides, blocks, overlaps, loads.get(row.layer_class)), row, shape
        )
    ]
    found = [replace(k, launches=0.0) if norms and _follows_all_reduce(k, table) else k for k in found]
    if fusions is None and gpu(shape.gpu).arch in profile.experts_route:
        found = [kernel for kernel in found if not kernel.op.startswith(_ROUTE)]
    after_attention = {
        id(two) for one, two in pairwise(found) if isinstance(one.spec, Attention) and _same_class(one, two)
    }
    offers = chosen(table, profile, fusions)
    done: list[Kernel] = []
    for name in dict.fromkeys(kernel.layer_class for kernel in found):
        mine = [kernel for kernel in found if kernel.layer_class == name]
        done.extend(fused(mine, [offer for offer in offers if offer.layer_class == name]))
    return [
        made
        for kernel in done
        for made in _with_quantization(kernel, shape, profile, id(kernel) in after_attention)
    ]


def _loads(table: CostTable, rows: Sequence[tuple[Part, Row]]) -> dict[str, ExpertLoad]:
    """How often the routers of each layer class choose each expert in the traffic that is planned for."""
    biased = {row.layer_class for _, row in rows if row.op == _BIASED}
    return {
        row.layer_class: table.expert_load
        or usual(row.work.dims["experts"], balanced=row.layer_class in biased)
        for _, row in rows
        if row.work.family == "grouped_gemm"
    }


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
        traffic=per_token(work.reads + work.writes),
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
        experts=float(shape.slots(experts)),
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
