"""Kernels and collectives of one layer of each class, ready to be priced for a whole grid of loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from planc.cost_model import exchanges, lower, power_limit
from planc.cost_model.catalogue import EngineProfile, Gpu, Provenance, Support
from planc.cost_model.collectives import Fabric, group_source, spread
from planc.cost_model.features import Array, Load, StepLoad
from planc.cost_model.formats import product_precision
from planc.cost_model.kernels import (
    Attention,
    AttentionLoad,
    Gemm,
    GroupedGemm,
    KernelCosts,
    Part,
    Priced,
    Times,
    sources,
)
from planc.cost_model.rank_ops import Collective, Kernel, feature_names, unique
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable
from planc.ir.work import Amount

#: where the tokens, sequences and contexts stand among the features
_T, _S, _C = 1, 2, 3

PARTS: tuple[Part, ...] = ("step", "decode", "prefill")


class PricedLayers:
    """What a rank runs for one layer of each class; the same however layers are cut into pipeline stages.

    kernels        of all classes, each with its calls per layer; `index` says where its `times` stand
    collectives    likewise
    by_part        (kernels, collectives) that see a part of a step's tokens, per part of PARTS
    graphs         decode batches that have a CUDA graph, ascending; others are padded to the next;
                   `largest_graph` is 0 without
    mixed_decode   how many times longer decode attention takes in steps with prompts
    sources        how well founded the time of each unique kernel is
    """

    def __init__(
        self,
        table: CostTable,
        shape: EngineShape,
        gpu: Gpu,
        fabric: Fabric,
        profile: EngineProfile,
        fusions: frozenset[str] | None,
        costs: KernelCosts,
        max_num_seqs: int | None,
    ) -> None:
        self.shape, self.gpu, self.fabric, self.costs = shape, gpu, fabric, costs
        self.kernels = lower.kernels(table, shape, profile, fusions)
        self.unique, self.index = unique(self.kernels)
        self.mixed_decode = _mixed_decode(profile.support(gpu), self.unique)
        _, nodes = spread(shape.tp * shape.dp, gpu, fabric, 1)
        self.collectives = exchanges.collectives(
            table, shape, spread=nodes > 1, quantized=profile.quantized_gather
        )
        self.by_part = [(_seen_by(self.unique, part), _seen_by(self.collectives, part)) for part in PARTS]
        amounts = [a for k in self.unique for a in (k.rows, k.flops, k.nbytes, k.kv, k.reads, k.writes)]
        sizes = [c.size for c in self.collectives]
        others = (n for n in feature_names([*amounts, *sizes]) if n not in "TSC")
        self.names = ["1", "T", "S", "C", *others]
        self._groups = _groups(self.unique, self.names, costs, gpu)
        self.sources = _kernel_sources(self._groups, len(self.unique))
        self._sizes = _matrix(sizes, self.names)
        self._links = [costs.collective(c.kind, c.ranks, fabric) for c in self.collectives]
        no_graphs = shape.eager or gpu.vendor == "cpu"
        self.graphs = np.array(
            () if no_graphs else profile.cuda_graphs.sizes(max_num_seqs or profile.cuda_graphs.largest),
            dtype=np.float64,
        )
        self.largest_graph = max(self.graphs, default=0.0)
        self._beside = self._hidden()

    def link_sources(self) -> list[Provenance]:
        """How well founded the time of each collective is."""
        return [
            price.sources[0] if isinstance(price, Priced) else group_source(item.ranks, self.gpu, self.fabric)
            for item, price in zip(self.collectives, self._links, strict=True)
        ]

    def _hidden(self) -> Array:
        """Seconds [unique, 1] that the routed experts hide of kernels beside them: what one token takes.

        That is starts, and weights of a layer that is small beside the experts. More tokens want the same
        arithmetic units and take their time.
        """
        beside = np.array([[k.overlapped] for k in self.unique], dtype=np.float64).reshape(-1, 1)
        self._beside = np.zeros_like(beside)
        return beside * self.times(StepLoad(1, 1).arrays())[0].seconds if beside.any() else self._beside

    def times(self, load: Load) -> tuple[Times, Array]:
        """Seconds of one call of each unique kernel [unique, N], and of each collective [collectives, N]."""
        features = self.features(load)
        seconds = np.zeros((len(self.unique), load.size))
        bound = np.zeros_like(seconds, dtype=np.int8)
        for group in self._groups:
            seen = features[group.part]
            found = group.price(seen)
            slower = power_limit.slowdown(self.gpu, group.joules @ seen, found.seconds)
            seconds[group.index], bound[group.index] = found.seconds * slower, found.bound
        seconds = np.maximum(seconds - self._beside, 0.0)
        links = np.zeros((len(self.collectives), load.size))
        done: dict[object, int] = {}
        for row, item in enumerate(self.collectives):
            key = (item.kind, item.ranks, item.part, self._sizes[row].tobytes())
            if key in done:  # most layers end in the same all-reduce
                links[row] = links[done[key]]
                continue
            done[key] = row
            size = self._sizes[row] @ features[item.part]
            links[row] = self._links[row](size)
        return Times(seconds, bound), links

    def _on_fullest(self, load: Load) -> Load:
        """The load of the fullest attention rank where `load` is the mean one: a sequence more, where the
        engine's graphs have room for it."""
        if self.shape.dp == 1:
            return load
        room = load.seqs < (self.largest_graph or np.inf)
        return replace(load, seqs=load.seqs + ((load.seqs > 0) & room))

    def features(self, load: Load) -> dict[str, Array]:
        """[features, N] for each part; the whole step's tokens are padded to a captured graph size. Of a
        decoding sequence's cache each of cp ranks reads its share."""
        padded = load = self._on_fullest(load)
        if self.graphs.size:
            slot = np.searchsorted(self.graphs, load.seqs)
            up = self.graphs[np.minimum(slot, self.graphs.size - 1)]
            fits = (load.tokens == 0) & (load.seqs > 0) & (slot < self.graphs.size)
            padded = Load(np.where(fits, up, load.seqs), load.context, load.tokens, load.chunks, load.cached)
        found = {
            "step": padded.merged(self.names),
            "decode": replace(load, context=load.context / self.shape.cp).decode(self.names),
            "prefill": load.prefill(self.names),
        }
        return {part: np.stack([values[name] for name in self.names]) for part, values in found.items()}


def _mixed_decode(support: Support | None, kernels: Sequence[Kernel]) -> float:
    """How many times longer decode attention takes in steps with prompts, at least 1."""
    specs = [kernel.spec for kernel in kernels if isinstance(kernel.spec, Attention)]
    groups = [s.q_heads / s.kv_heads for s in specs if s.kind == "attention" and s.kv_heads and not s.latent]
    return max(1.0, support.mixed_decode * max(groups)) if support and groups else 1.0


@dataclass(frozen=True, slots=True)
class _Group:
    """Unique kernels of one family that see the same tokens, ready to be priced.

    joules   [K, features] energy of their matrix products
    """

    part: Part
    index: npt.NDArray[np.intp]
    price: Callable[[Array], Times]
    sources: tuple[Provenance, ...]
    joules: Array


def _groups(kernels: Sequence[Kernel], names: Sequence[str], costs: KernelCosts, gpu: Gpu) -> list[_Group]:
    """Stacks kernels by family and part; `price` takes the part's features [1 + features, N]."""
    found: dict[tuple[str, Part], list[int]] = {}
    for i, kernel in enumerate(kernels):
        family = kernel.family if isinstance(kernel.spec, Gemm | GroupedGemm) else ""
        family = "attention" if isinstance(kernel.spec, Attention) else family
        found.setdefault((family, kernel.part), []).append(i)
    return [
        _Group(
            part,
            np.array(index),
            *_pricer(family, [kernels[i] for i in index], names, costs),
            _matrix([kernels[i].flops * _joules(kernels[i], gpu) for i in index], names),
        )
        for (family, part), index in found.items()
    ]


def _joules(kernel: Kernel, gpu: Gpu) -> float:
    """Energy of one operation of a kernel's products, J; 0 for kernels without."""
    spec = kernel.spec
    if isinstance(spec, Gemm | GroupedGemm):
        return power_limit.joules(gpu, product_precision(spec.weights, spec.activations))
    return power_limit.joules(gpu, "bf16") if isinstance(spec, Attention) else 0.0


def _pricer(
    family: str, mine: Sequence[Kernel], names: Sequence[str], costs: KernelCosts
) -> tuple[Callable[[Array], Times], tuple[Provenance, ...]]:
    of = lambda field: _matrix([getattr(k, field) for k in mine], names)  # noqa: E731
    if family in ("gemm", "grouped_gemm"):
        rows, specs = of("rows"), [k.spec for k in mine]
        price = costs.gemm(specs) if family == "gemm" else costs.grouped_gemm(specs)  # type: ignore[arg-type]
        return lambda x: price(rows @ x), sources(price, costs, len(mine))
    if family == "attention":
        attend = costs.attention([k.spec for k in mine])  # type: ignore[misc]
        flops, kv, acts = of("flops"), of("kv"), of("reads") + of("writes")
        load = lambda x: AttentionLoad(flops @ x, kv @ x, acts @ x, x[_T], x[_S], x[_C])  # noqa: E731
        return lambda x: attend(load(x)), sources(attend, costs, len(mine))
    touch = costs.elementwise(np.array([[k.launches] for k in mine]))
    nbytes = of("nbytes")
    return lambda x: touch(nbytes @ x), sources(touch, costs, len(mine))


def _kernel_sources(groups: Sequence[_Group], count: int) -> list[Provenance]:
    """How well founded each unique kernel is."""
    found: list[Provenance] = ["measured"] * count
    for group in groups:
        for index, source in zip(group.index, group.sources, strict=True):
            found[index] = source
    return found


def _seen_by(items: Sequence[Kernel | Collective], part: str) -> npt.NDArray[np.intp]:
    """Which of the items see this part of a step's tokens."""
    return np.array([i for i, item in enumerate(items) if item.part == part], dtype=np.intp)


def _matrix(amounts: Sequence[Amount], names: Sequence[str]) -> Array:
    """[R, features] coefficients."""
    return np.array([[a.terms.get(name, 0.0) for name in names] for a in amounts])
