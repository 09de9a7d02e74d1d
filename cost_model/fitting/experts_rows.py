"""Rows of the routed experts' tables, read and cleaned.

Of `moe_perf` the rows of `power_law_1.2` are used (serving points are missed by up to twice the error with
balanced ones). Of several versions the newest counts, and older ones that run the same kernels within
5 % of it on the shapes that both have.
Set aside, by rule:

    experts without a gate (kernels named so, and the shapes that they were timed at), other activations
    kernels that stream weights at less than 0.4 of the memory bandwidth, where the engine or another one has
    rows that do not (per-tensor fp8 through FlashInfer's CUTLASS on Hopper takes four times as long as the
    Triton kernel it replaced)
    deployments over more than 64 ranks
    deployments over several ranks of kernels that were given all tokens on each: on eight ranks they take
    more than 3 times their share of what one rank takes (SGLang's until 0.5.10, Triton's block fp8 of
    TensorRT-LLM, Marlin's mxfp4 of SGLang; all others at most 2.6 times)
    shapes at which an engine's tuner took a wrong kernel: more than 2.2 times as slow, by the table's
    formula, as another shape of the same model at most twice or half as large each way (TensorRT-LLM on
    Hopper), or more than 1.3 times as slow beside another GPU of the same architecture as the median shape

Weights that fit the L2 cache came from there (`measured.loops`): rows are compared with the formula of such a
loop, and prices are made with weights from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planc.cost_model import catalogue
from planc.cost_model.catalogue import Gpu, Precision
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.experts import ExpertKernel, terms
from planc.cost_model.features import Array
from planc.cost_model.fitting import sources
from planc.cost_model.formats import fmt, product_precision
from planc.cost_model.kernels import GroupedGemm
from planc.cost_model.measured.loops import Loop
from planc.cost_model.routing import TOKENS, routed

DISTRIBUTION = "power_law_1.2"
_OTHER = "nongated|situ"
_MOST_RANKS = 64
_LEAST_STREAM = 0.4
_AGREES = 0.05
_MISTUNED = 2.2
_MISTUNED_BESIDE = 1.3
_FEWEST_BESIDE = 10
_NODE = 8
_UNSHARED = 3.0
_BUSY = 4096  # tokens from which times tell shares

#: tables' formats -> planc's (weights, activations)
FORMATS = {
    "bfloat16": ("bf16", "bf16"),
    "fp8": ("fp8", "fp8"),
    "fp8_block": ("fp8_block", "fp8"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "int4_wo": ("w4a16", "bf16"),
    "w4a16_mxfp4": ("mxfp4", "bf16"),
    "w4a8_mxfp4_mxfp8": ("mxfp4", "mxfp8"),
}

#: kernels that have a table of their own beside the fastest ones', for deployments that are set to them
LIBRARIES = {"moe_torch_flow_cutlass": "cutlass"}

#: token counts that tables keep
KEPT: Array = np.array([2.0**power for power in range(15)])
_AT = np.searchsorted(TOKENS, KEPT)
_MEMORY = ExpertKernel.names().index("memory")

_SHAPE = ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of one engine and format on one GPU: seconds [shapes, `KEPT`], nan where not timed, and
    what each constant of the formula adds to them [shapes, `KEPT`, constants].

    library   whose kernels they are; "": the fastest of all that the engine has
    """

    gpu: Gpu
    engine: str
    format: str
    versions: tuple[str, ...]
    specs: tuple[GroupedGemm, ...]
    seconds: Array
    terms: Array
    dropped: int
    library: str = ""

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.engine, self.format, self.library)))

    def take(self, shapes: npt.NDArray[np.intp]) -> Rows:
        specs = tuple(self.specs[i] for i in shapes)
        return replace(self, specs=specs, seconds=self.seconds[shapes], terms=self.terms[shapes])

    def without(self, bad: npt.NDArray[np.bool_]) -> Rows:
        """Without some shapes, whose rows count as dropped."""
        count = int(np.isfinite(self.seconds[bad]).sum())
        return replace(self.take(np.flatnonzero(~bad)), dropped=self.dropped + count)

    def ideal(self, kernel: ExpertKernel) -> Array:
        return self.terms @ kernel.factors

    @property
    def solved(self) -> ExpertKernel:
        """The constants that fit these rows best; what none of them shows is that of all tables."""
        timed = np.isfinite(self.seconds)
        found = solve(self.terms[timed], self.seconds[timed], np.ones(timed.sum()))
        if any(spec.ranks > 1 for spec in self.specs):
            return found
        usual = efficiencies().on("expert_other_moves", self.gpu, precision(self))
        return replace(found, other_moves=usual)


def read(folder: Path) -> dict[str, list[Rows]]:
    """The tables of every GPU, without shapes that a GPU of the same architecture runs far faster."""
    names = dict.fromkeys(sources.GPUS.values())
    found = {name: list(_measured(folder, catalogue.gpu(name))) for name in names}
    everything = [rows for mine in found.values() for rows in mine]
    return {name: [_like_twins(rows, everything) for rows in mine] for name, mine in found.items()}


def precision(rows: Rows) -> Precision:
    """The arithmetic that a table's products run in."""
    return product_precision(*FORMATS[rows.format])


def peaks(gpu: Gpu, name: str) -> tuple[float, float, float]:
    """Bytes per weight of a format, bytes/s, flop/s."""
    weights, activations = FORMATS[name]
    return fmt(weights).bytes, gpu.memory_bytes_s, gpu.peak_flops(product_precision(weights, activations))


def _like_twins(rows: Rows, everything: Sequence[Rows]) -> Rows:
    """Without shapes that take `_MISTUNED_BESIDE` times as long as beside a GPU of the same architecture, by
    what the two take for the median shape."""
    known = dict(zip(map(_shape, rows.specs), range(len(rows.specs)), strict=True))
    bad = np.zeros(len(rows.specs), dtype=bool)
    for twin in everything:
        if twin.name != rows.name or twin.gpu.arch != rows.gpu.arch or twin.gpu is rows.gpu:
            continue
        theirs = [(known[_shape(spec)], at) for at, spec in enumerate(twin.specs) if _shape(spec) in known]
        if len(theirs) < _FEWEST_BESIDE:
            continue
        mine, other = np.array(theirs).T
        slower = np.nanmedian(np.log(rows.seconds[mine] / twin.seconds[other]), axis=1)
        bad[mine] |= slower - np.nanmedian(slower) > np.log(_MISTUNED_BESIDE)
    return rows.without(bad)


def _shape(spec: GroupedGemm) -> tuple[float, ...]:
    return spec.hidden, spec.inner, spec.experts, spec.total_experts, spec.top_k


def _measured(folder: Path, gpu: Gpu) -> Iterator[Rows]:
    found = sources.tables(folder, "moe", "moe_perf", gpu=gpu.name, newest=False)
    frames = [_frame(source, order) for order, source in enumerate(found)]  # ascending versions
    if not frames:
        return
    import pandas

    rows = pandas.concat(frames)
    named, models = rows["kernel_source"].str.contains(_OTHER), pandas.MultiIndex.from_frame(rows[_SHAPE[:4]])
    bare = models[rows["kernel_source"].str.contains("nongated")].unique()
    odd = named | models.isin(bare)
    wide = rows["moe_tp_size"] * rows["moe_ep_size"] > _MOST_RANKS
    rows = rows[~odd & ~wide & rows["moe_dtype"].isin(FORMATS)]
    slow, unshared = _slow(rows, gpu), _unshared(rows)
    for (engine, name), mine in rows.groupby(["engine", "moe_dtype"]):
        kernels = list(mine[_KERNEL].itertuples(index=False, name=None))
        whole = np.array([key in unshared for key in kernels]) & (mine["moe_ep_size"] > 1)
        kept = _agreeing(mine[~whole & np.array([key not in slow for key in kernels])])
        if len(kept):
            yield _tuned(_square(kept, gpu, str(engine), str(name), len(mine) - len(kept)))
        for source, library in LIBRARIES.items():
            of = mine[mine["kernel_source"] == source]
            if len(of) and set(kept["kernel_source"]) - {source}:  # else the table above is this library's
                yield _tuned(replace(_square(of, gpu, str(engine), str(name), 0), library=library))


def _frame(source: sources.Source, order: int) -> Any:
    rows = source.read()
    rows = rows[(rows["distribution"] == DISTRIBUTION) & rows["num_tokens"].isin(KEPT)]
    return rows.assign(engine=source.engine, version=source.version, order=order)


_KERNEL = ["engine", "version", "kernel_source", "moe_dtype"]


def _slow(rows: Any, gpu: Gpu) -> set[tuple[str, ...]]:
    """Kernels whose best tenth of rows streams weights too slowly, where the format has better ones."""
    share: dict[tuple[str, ...], float] = {}
    for key, mine in rows.groupby(_KERNEL):
        square = _square(mine, gpu, key[0], key[3], 0)
        streams = square.terms[:, :, _MEMORY] / square.seconds
        share[key] = float(np.nanquantile(streams, 0.9))
    best = {name: max(s for key, s in share.items() if key[3] == name) for name in rows["moe_dtype"].unique()}
    best["fp8"] = max(best.get("fp8", 0.0), best.get("fp8_block", 0.0))
    return {key for key, s in share.items() if s < _LEAST_STREAM <= best[key[3]]}


def _agreeing(rows: Any) -> Any:
    """Rows of the newest version, and of older ones that run its kernels as fast on the shapes they share."""
    import pandas

    by = dict(iter(rows.groupby("order")))
    if not by:
        return rows
    kept = by.pop(max(by))
    shape = [*_SHAPE, "num_tokens"]
    for _, older in sorted(by.items(), reverse=True):
        both = kept.merge(older, on=[*shape, "kernel_source"], suffixes=("", "_old"))
        off = (both["latency_old"] / both["latency"] - 1.0).abs().median() if len(both) else 0.0
        if off <= _AGREES and older["kernel_source"].isin(kept["kernel_source"]).all():
            kept = pandas.concat([kept, older])
    return kept


def _unshared(rows: Any) -> set[tuple[str, ...]]:
    """Kernels that ran all tokens' experts on each of several ranks."""
    busy = rows[rows["num_tokens"] >= _BUSY]
    one, node = (busy[busy["moe_ep_size"] == ranks] for ranks in (1, _NODE))
    both = one.merge(node, on=[*_KERNEL, *_SHAPE[:5], "num_tokens"], suffixes=("", "_node"))
    loads = zip(both["num_experts"], both["topk"], both["num_tokens"], strict=True)
    share = [_fullest(int(experts), int(top_k), float(tokens)) for experts, top_k, tokens in loads]
    both = both.assign(times=both["latency_node"] / both["latency"] / share)
    return {key for key, mine in both.groupby(_KERNEL) if mine["times"].median() > _UNSHARED}


def _fullest(experts: int, top_k: int, tokens: float) -> float:
    """Share of all pairs that the fullest of a node's ranks has."""
    at = np.searchsorted(TOKENS, tokens)
    return float(routed(experts, top_k, _NODE).pairs[at] / (tokens * top_k))


def _square(rows: Any, gpu: Gpu, engine: str, name: str, dropped: int) -> Rows:
    """Per shape the newest version's rows; of several kernels the fastest, which the engine would take."""
    newest = rows.groupby(_SHAPE)["order"].transform("max")
    rows = rows[rows["order"] == newest]
    found = rows.pivot_table(index=_SHAPE, columns="num_tokens", values="latency", aggfunc="min") * 1e-3
    found = found.reindex(columns=KEPT)
    specs = tuple(_spec(shape, *FORMATS[name]) for shape in found.index)
    versions = tuple(sorted(set(rows["version"]), key=sources.version_key))
    parts = np.stack([terms(spec, *peaks(gpu, name))[:, _AT].T for spec in specs])
    parts[..., _MEMORY] = Loop.on(gpu).seconds(parts[..., _MEMORY] * gpu.memory_bytes_s)
    return Rows(gpu, engine, name, versions, specs, found.to_numpy(), parts, dropped)


def _tuned(rows: Rows) -> Rows:
    """Without shapes that are far slower than similar ones of the same model."""
    slower = np.nanmedian(np.log(rows.seconds / rows.ideal(rows.solved)), axis=1)
    model = np.array([(s.hidden, s.total_experts, s.top_k) for s in rows.specs])
    size = np.log([(s.inner, s.experts) for s in rows.specs])
    same = (model[:, None] == model).all(-1)
    near = (np.abs(size[:, None] - size) <= np.log(2.0) + 1e-9).all(-1)
    beyond = slower[:, None] - slower > np.log(_MISTUNED)
    return rows.without((same & near & beyond).any(axis=1))


def _spec(shape: tuple[int, ...], weights: str, activations: str) -> GroupedGemm:
    hidden, inner, top_k, total, tp, ep = shape
    width, experts = inner / tp, total / ep
    return GroupedGemm(
        experts=experts,
        total_experts=int(total),
        top_k=int(top_k),
        elements=experts * 3.0 * hidden * width,
        flops_per_pair=6.0 * hidden * width,
        hidden=float(hidden),
        inner=width,
        weights=weights,
        activations=activations,
        ranks=int(ep),
    )


def solve(terms: Array, seconds: Array, share: Array) -> ExpertKernel:
    """Constants >= 0 that leave the least relative error; far rows count less with each round."""
    from scipy.optimize import lsq_linear

    ratio = terms / seconds[:, None]
    scale = np.maximum(ratio.max(axis=0), 1e-30)
    low, high = np.zeros(scale.size), np.full(scale.size, np.inf)
    low[-2:], high[-2:] = scale[-2:] / 1.2, scale[-2:] * 20.0
    weight = np.sqrt(share)
    for _ in range(6):
        found = lsq_linear(ratio / scale * weight[:, None], weight, (low, high)).x
        off = np.abs(np.log(np.maximum(ratio / scale @ found, 1e-6)))
        weight = np.sqrt(share / np.maximum(off, 0.05))
    values = found / scale
    values[-2:] = 1.0 / values[-2:]
    return ExpertKernel(*map(float, values))
