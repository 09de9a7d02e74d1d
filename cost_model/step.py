"""Seconds of one engine step, for a whole grid of loads in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from planc.cost_model import lower, power_limit
from planc.cost_model.catalogue import EngineProfile, Gpu, Provenance, Support
from planc.cost_model.collectives import Fabric, Link, group_source, seconds, spread
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.features import Array, Load, StepLoad
from planc.cost_model.formats import fmt, product_precision
from planc.cost_model.intensity import Done, done
from planc.cost_model.kernels import (
    BOUNDS,
    LINK,
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
from planc.cost_model.local import is_layer, stages, unquantized
from planc.cost_model.lower import Collective, Kernel
from planc.cost_model.measured import costs_for
from planc.cost_model.parts import split
from planc.cost_model.quantity import ORDER, Quantity, worst
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable
from planc.ir.work import Amount

__all__ = ["StepLoad", "StepModel", "StepPart"]

#: loads evaluated at once; keeps temporaries within a core's cache
_BLOCK = 4096

#: where the tokens, sequences and contexts stand among the features
_T, _S, _C = 1, 2, 3

#: the step by whose times sources are weighed, and the share of its seconds that may be founded worse
_TYPICAL = StepLoad(decode_seqs=32, decode_context=2000, prefill_tokens=1024)
_NEGLIGIBLE = 0.1


@dataclass(frozen=True, slots=True)
class StepPart:
    """One line of a breakdown: all calls of an op over the layers of one class in one stage.

    calls    over all those layers
    done     what one call does; None for collectives and host time
    """

    layer_class: str
    site: str
    op: str
    seconds: float
    bound: str
    source: Provenance
    calls: float = 1.0
    done: Done | None = None


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a step's seconds are made of, each [stages, N].

    shared, decode, prefill   kernels and collectives that see all tokens, those of decoding sequences
                              alone, and those of prompts alone
    launches                  host time to launch every kernel: the step takes no less than this
    host                      what kernels do not hide: host time per step, and hand-over between stages. For
                              each micro-batch an engine goes through the sequences of all of them (vLLM's
                              `running`, TensorRT-LLM's `active_requests`)
    """

    shared: Array
    decode: Array
    prefill: Array
    launches: Array
    host: Array

    @property
    def device(self) -> Array:
        return self.shared + self.decode + self.prefill


#: what `StepModel._lower` finds: it does not depend on pipeline stages
_SHARED = (
    "costs",
    "kernels",
    "_unique",
    "_index",
    "mixed_decode",
    "_collectives",
    "_link_costs",
    "_by_part",
    "_names",
    "_groups",
    "_sizes",
    "_sources",
    "_graphs",
)


class StepModel:
    """One engine shape on one GPU type, ready to price steps.

    A step of a pipeline is the time its slowest stage needs for one micro-batch: in the steady state a
    new step starts every so often. `latency` is the time until a micro-batch has passed all stages.

    With attention data parallel (dp > 1) a load is the mean one of the dp ranks. They meet in every layer, so
    that a step is as long as on the fullest of them, which decodes one sequence more than the mean: routers
    that send a request to the emptiest rank keep ranks within about one of each other.
    """

    def __init__(
        self,
        table: CostTable,
        shape: EngineShape,
        gpu: Gpu,
        fabric: Fabric,
        profile: EngineProfile,
        fusions: frozenset[str] | None = None,
        *,
        costs: KernelCosts | None = None,
        max_num_seqs: int | None = None,
        like: StepModel | None = None,
    ) -> None:
        """like: a model of the same engine with other pipeline stages, whose kernels are taken over."""
        table = split(table, shape.formats)
        self.table, self.shape, self.gpu, self.fabric, self.profile = table, shape, gpu, fabric, profile
        if like is None:
            self.costs: KernelCosts = costs_for(gpu, profile) if costs is None else costs
            self._lower(fusions, max_num_seqs)
        else:
            for name in _SHARED:
                setattr(self, name, getattr(like, name))
        self._stages = stages(table, shape)
        count = {c.name: i for i, c in enumerate(table.classes)}
        self._kernel_calls = _calls(self.kernels, self._stages, count, self._index, len(self._unique))
        self._collective_calls = _calls(
            self._collectives, self._stages, count, range(len(self._collectives)), len(self._collectives)
        )
        attention = [kernel for kernel in self.kernels if kernel.part != "step"]
        self._launches = np.array([_launches(self.kernels, s.counts, count) for s in self._stages])
        self._between_graphs = np.array(
            [len(s.layers) + _launches(attention, s.counts, count) for s in self._stages]
        )
        self._beside = self._hidden()

    def _lower(self, fusions: frozenset[str] | None, max_num_seqs: int | None) -> None:
        """Kernels and collectives of one layer of each class, ready to be priced (`_SHARED`)."""
        table, shape, gpu, fabric, profile = self.table, self.shape, self.gpu, self.fabric, self.profile
        self.kernels = lower.kernels(table, shape, profile, fusions)
        self._unique, self._index = lower.unique(self.kernels)
        _, nodes = spread(shape.tp * shape.dp, gpu, fabric, 1)
        self.mixed_decode = _mixed_decode(profile.support(gpu), self._unique)
        self._collectives = lower.collectives(
            table, shape, spread=nodes > 1, quantized=profile.quantized_gather
        )
        self._link_costs = [self.costs.collective(c.kind, c.ranks, fabric) for c in self._collectives]
        self._by_part = [
            (_seen_by(self._unique, part), _seen_by(self._collectives, part))
            for part in ("step", "decode", "prefill")
        ]
        amounts = [a for k in self._unique for a in (k.rows, k.flops, k.nbytes, k.kv, k.reads, k.writes)]
        sizes = [c.size for c in self._collectives]
        self._names = [
            "1",
            "T",
            "S",
            "C",
            *(n for n in lower.feature_names([*amounts, *sizes]) if n not in "TSC"),
        ]
        self._groups = _groups(self._unique, self._names, self.costs, gpu)
        self._sizes = _matrix(sizes, self._names)
        self._sources = _kernel_sources(self._groups, len(self._unique))
        no_graphs = shape.eager or gpu.vendor == "cpu"
        self._graphs = np.array(
            () if no_graphs else profile.cuda_graphs.sizes(max_num_seqs or profile.cuda_graphs.largest),
            dtype=np.float64,
        )

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Decode batches that have a CUDA graph; others are padded to the next. () without graphs."""
        return tuple(int(size) for size in self._graphs)

    @cached_property
    def source(self) -> Provenance:
        """The least well founded of the links and of the kernels, leaving aside kernels that together take
        less than a tenth of the kernels' time in a typical step. "fitted" at best: what an engine adds to
        its kernels is fitted."""
        times, _ = self._times(_TYPICAL.arrays())
        each = self._kernel_calls.sum(axis=0) * times.seconds[:, 0]
        enough, taken = _NEGLIGIBLE * float(each.sum()), 0.0
        kernels: Provenance = self.costs.source
        for source in reversed(ORDER):
            taken += float(sum(t for t, of in zip(each, self._sources, strict=True) if of == source))
            if taken > enough:
                kernels = source
                break
        return worst(["fitted", kernels, *self._link_sources(), *(link.source for link in self._hops())])

    def _link_sources(self) -> list[Provenance]:
        return [
            price.sources[0] if isinstance(price, Priced) else group_source(item.ranks, self.gpu, self.fabric)
            for item, price in zip(self._collectives, self._link_costs, strict=True)
        ]

    @property
    def band(self) -> tuple[float, float]:
        """(low, high) factors on the seconds."""
        return efficiencies().band(self.source)

    def quantity(self, seconds: float) -> Quantity:
        """Seconds with this model's band and provenance."""
        return Quantity.within(seconds, self.band, self.source)

    @property
    def launches(self) -> float:
        """Kernels that a step launches, over all stages."""
        return float(self._launches.sum())

    @property
    def asynchronous(self) -> bool:
        """Whether the next step is decided while one runs: where the engine does so, but on no CPU and not
        with pipeline stages, which have loops of their own (vLLM 0.14's release notes say so of vLLM)."""
        return self.profile.overlaps_host and self.gpu.vendor != "cpu" and self.shape.pp == 1

    def seconds(self, load: StepLoad) -> Array:
        """One engine step, s, in the common shape of the load's fields; 0 for an empty step."""
        return self._fold(load, slowest=True)

    def latency(self, load: StepLoad) -> Array:
        """The same micro-batch through all pipeline stages, s."""
        return self._fold(load, slowest=False)

    def pieces(self, load: StepLoad) -> Pieces:
        """The parts of each stage's time for a flat grid of loads.

        seconds = max(device + (prefill_factor - 1) (device - device without the prompts), launches) + host
        """
        return self._pieces(load.arrays())

    def kernel_seconds(self, load: StepLoad) -> list[tuple[Kernel, Array]]:
        """Every kernel with the seconds of all its calls over the layers of all stages, [N]."""
        times, _ = self._times(load.arrays())
        counts = dict(zip((cls.name for cls in self.table.classes), self._counts(), strict=True))
        return [
            (kernel, times.seconds[index] * (kernel.calls * counts[kernel.layer_class]))
            for kernel, index in zip(self.kernels, self._index, strict=True)
        ]

    def layer_seconds(self, load: StepLoad) -> tuple[Array, Array]:
        """What one layer of each class adds to its stage, s, [classes, N] each: kernels, collectives and the
        engine's time per numbered layer; and host time to launch them, below which no stage gets."""
        flat = load.arrays()
        times, links = self._times(flat)
        order = {cls.name: at for at, cls in enumerate(self.table.classes)}
        factor, per_launch = self.profile.kernel_factor, self._per_launch(flat)
        layer_s = np.array([[self.profile.layer_us * 1e-6 * is_layer(cls)] for cls in self.table.classes])
        device, launches = np.tile(layer_s, flat.size), np.zeros((len(order), flat.size))
        for kernel, index in zip(self.kernels, self._index, strict=True):
            device[order[kernel.layer_class]] += factor * kernel.calls * times.seconds[index]
            launches[order[kernel.layer_class]] += kernel.calls * kernel.launches * per_launch
        for item, row in zip(self._collectives, links, strict=True):
            device[order[item.layer_class]] += factor * item.calls * row
        return device, launches

    def _per_launch(self, load: Load) -> Array:
        """Host seconds per kernel, [N]: none where the step replays a graph."""
        graphed = (load.tokens == 0) & (load.seqs <= (self._graphs[-1] if self._graphs.size else 0.0))
        one = self.profile.launch_eager_us if self.shape.eager else self.profile.launch_us
        found: Array = np.where(
            graphed | (self.gpu.vendor == "cpu"), 0.0, one * self.gpu.host_slowdown * 1e-6
        )
        return found

    def _counts(self) -> list[int]:
        return [sum(stage.counts[i] for stage in self._stages) for i in range(len(self.table.classes))]

    def breakdown(self, load: StepLoad, stage: int = 0) -> list[StepPart]:
        """Where the time of a single load goes on one stage, in the table's order.

        The parts sum to the stage's time. The last one, of layer class "step", is what no kernel or
        collective takes: host overhead, launches that kernels don't hide, the engine's factor on
        prompts, the hand-over to the next stage. Raises ValueError for more than one load.
        """
        flat = load.arrays()
        if flat.size != 1:
            raise ValueError(f"breakdown takes one load, not {flat.size}")
        times, links = self._times(flat)
        order = {c.name: i for i, c in enumerate(self.table.classes)}
        counts = self._stages[stage].counts
        features = {
            part: {name: float(value) for name, value in zip(self._names, values[:, 0], strict=True)}
            for part, values in self._features(flat).items()
        }
        found = []
        for kernel, index in zip(self.kernels, self._index, strict=True):
            calls = kernel.calls * counts[order[kernel.layer_class]]
            total = float(times.seconds[index, 0] * calls)
            bound = BOUNDS[int(times.bound[index, 0])]
            if total > 0:
                site, source = "+".join(kernel.sites), self._sources[index]
                what = done(kernel, features[kernel.part])
                found.append(StepPart(kernel.layer_class, site, kernel.op, total, bound, source, calls, what))
        for item, row, source in zip(self._collectives, links, self._link_sources(), strict=True):
            total = row[0] * item.calls * counts[order[item.layer_class]]
            if total > 0:
                found.append(
                    StepPart(item.layer_class, item.site, item.kind, float(total), BOUNDS[LINK], source)
                )
        device = sum(part.seconds for part in found)
        whole = float(self._stage_seconds(flat)[stage, 0])
        found.append(StepPart("step", "", "host and hand-over", whole - device, "launch", "assumed"))
        return found

    # -- evaluation ----------------------------------------------------------------------

    def _fold(self, load: StepLoad, *, slowest: bool) -> Array:
        flat = load.arrays()
        out = np.empty(flat.size)
        for start in range(0, flat.size, _BLOCK):
            block = _slice(flat, start, start + _BLOCK)
            per_stage = self._stage_seconds(block)
            out[start : start + _BLOCK] = per_stage.max(axis=0) if slowest else per_stage.sum(axis=0)
        return out.reshape(flat.shape)

    def _stage_seconds(self, load: Load) -> Array:
        """[stages, N]: device time, host time and hand-over of each stage."""
        pieces = self._pieces(load)
        device = pieces.device
        extra = self.profile.prefill_factor - 1.0
        if extra and bool(np.any(load.tokens > 0)):
            alone = Load(
                load.seqs, load.context, np.zeros_like(load.tokens), np.zeros_like(load.tokens), load.cached
            )
            device = device + extra * np.maximum(device - self._pieces(alone).device, 0.0)
        if self.mixed_decode > 1.0:
            device = device + np.where(load.tokens > 0, (self.mixed_decode - 1.0) * pieces.decode, 0.0)
        total = np.maximum(device, pieces.launches) + pieces.host
        found: Array = np.where(load.seqs + load.tokens > 0, total, 0.0)
        return found

    def _hops(self) -> list[Link]:
        """The link from each pipeline stage to the next: the network where any of their ranks needs it."""
        ranks, island = self.shape.world // self.shape.pp, self.fabric.scale_up(self.gpu)
        same = [
            stage * ranks // island == ((stage + 2) * ranks - 1) // island
            for stage in range(self.shape.pp - 1)
        ]
        return [
            self.fabric.inner(self.gpu, 2 * ranks) if near else self.fabric.outer(self.gpu) for near in same
        ]

    def _pieces(self, load: Load) -> Pieces:
        times, links = self._times(load)
        factor = self.profile.kernel_factor
        shared, decode, prefill = (
            factor * (self._kernel_calls[:, kernels] @ times.seconds[kernels])
            + factor * (self._collective_calls[:, moves] @ links[moves])
            for kernels, moves in self._by_part
        )
        rows, per_launch = load.seqs + load.tokens, self._per_launch(load)
        fixed = self.profile.step_eager_us if self.shape.eager else self.profile.step_us
        layers = np.array([[len(stage.layers)] for stage in self._stages])
        each = self.profile.per_sequence_us * (self.shape.pp * load.seqs + load.chunks)
        host = ((fixed + each) * self.gpu.host_slowdown + self.profile.layer_us * layers) * 1e-6
        piecewise = 0 if self.shape.eager else self.profile.cuda_graphs.piecewise
        launched = np.where(rows <= piecewise, self._between_graphs[:, None], self._launches[:, None])
        launches = launched * per_launch
        return Pieces(shared, decode, prefill, launches, self._hand_over(rows) + host)

    def _hand_over(self, tokens: Array) -> Array:
        """Activations to the next stage, [stages, N]; the last one hands over nothing."""
        if self.shape.pp == 1:
            return np.zeros((1, tokens.size))
        size = tokens * self.table.model.hidden * fmt(unquantized(self.shape)).bytes / self.shape.tp
        hops = [seconds("p2p", size, 2, link) for link in self._hops()]
        return np.stack([*hops, np.zeros_like(size)])

    def _hidden(self) -> Array:
        """Seconds [unique, 1] that the routed experts hide of kernels beside them: what one token takes.

        That is starts, and weights of a layer that is small beside the experts. More tokens want the same
        arithmetic units and take their time.
        """
        beside = np.array([[k.overlapped] for k in self._unique], dtype=np.float64).reshape(-1, 1)
        self._beside = np.zeros_like(beside)
        return beside * self._times(StepLoad(1, 1).arrays())[0].seconds if beside.any() else self._beside

    def _times(self, load: Load) -> tuple[Times, Array]:
        features = self._features(load)
        seconds = np.zeros((len(self._unique), load.size))
        bound = np.zeros_like(seconds, dtype=np.int8)
        for group in self._groups:
            seen = features[group.part]
            found = group.price(seen)
            slower = power_limit.slowdown(self.gpu, group.joules @ seen, found.seconds)
            seconds[group.index], bound[group.index] = found.seconds * slower, found.bound
        seconds = np.maximum(seconds - self._beside, 0.0)
        links = np.zeros((len(self._collectives), load.size))
        done: dict[object, int] = {}
        for row, item in enumerate(self._collectives):
            key = (item.kind, item.ranks, item.part, self._sizes[row].tobytes())
            if key in done:  # most layers end in the same all-reduce
                links[row] = links[done[key]]
                continue
            done[key] = row
            size = self._sizes[row] @ features[item.part]
            links[row] = self._link_costs[row](size)
        return Times(seconds, bound), links

    def _on_fullest(self, load: Load) -> Load:
        """The load of the fullest attention rank where `load` is the mean one: a sequence more, where the
        engine's graphs have room for it."""
        if self.shape.dp == 1:
            return load
        room = load.seqs < (self._graphs[-1] if self._graphs.size else np.inf)
        return replace(load, seqs=load.seqs + ((load.seqs > 0) & room))

    def _features(self, load: Load) -> dict[str, Array]:
        """[features, N] for each part; the whole step's tokens are padded to a captured graph size. Of a
        decoding sequence's cache each of cp ranks reads its share."""
        padded = load = self._on_fullest(load)
        if self._graphs.size:
            slot = np.searchsorted(self._graphs, load.seqs)
            up = self._graphs[np.minimum(slot, self._graphs.size - 1)]
            fits = (load.tokens == 0) & (load.seqs > 0) & (slot < self._graphs.size)
            padded = Load(np.where(fits, up, load.seqs), load.context, load.tokens, load.chunks, load.cached)
        found = {
            "step": padded.merged(self._names),
            "decode": replace(load, context=load.context / self.shape.cp).decode(self._names),
            "prefill": load.prefill(self._names),
        }
        return {part: np.stack([values[name] for name in self._names]) for part, values in found.items()}


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


def _launches(kernels: Sequence[Kernel], counts: Sequence[int], order: Mapping[str, int]) -> float:
    """How many kernels a stage with so many layers of each class launches."""
    return float(sum(k.calls * k.launches * counts[order[k.layer_class]] for k in kernels))


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


def _calls(
    items: Sequence[Kernel] | Sequence[Collective],
    held: Sequence[object],
    order: dict[str, int],
    index: Sequence[int],
    width: int,
) -> Array:
    """[stages, unique]: calls of each unique item over a stage's layers."""
    out = np.zeros((len(held), width))
    for item, column in zip(items, index, strict=True):
        for row, stage in enumerate(held):
            out[row, column] += item.calls * stage.counts[order[item.layer_class]]  # type: ignore[attr-defined]
    return out


def _seen_by(items: Sequence[Kernel | Collective], part: str) -> npt.NDArray[np.intp]:
    """Which of the items see this part of a step's tokens."""
    return np.array([i for i, item in enumerate(items) if item.part == part], dtype=np.intp)


def _matrix(amounts: Sequence[Amount], names: Sequence[str]) -> Array:
    """[R, features] coefficients."""
    return np.array([[a.terms.get(name, 0.0) for name in names] for a in amounts])


def _slice(load: Load, start: int, stop: int) -> Load:
    part = slice(start, stop)
    return Load(load.seqs[part], load.context[part], load.tokens[part], load.chunks[part], load.cached[part])
