"""Seconds of one engine step, for a whole grid of loads in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planc.cost_model.catalogue import EngineProfile, Gpu, Provenance
from planc.cost_model.collectives import Fabric, Link, seconds
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.features import Array, Load, StepLoad
from planc.cost_model.formats import fmt
from planc.cost_model.intensity import Done, done
from planc.cost_model.kernels import (
    BOUNDS,
    LINK,
    GroupedGemm,
    KernelCosts,
)
from planc.cost_model.launches import Launches
from planc.cost_model.local import is_layer, stages, unquantized
from planc.cost_model.measured import costs_for
from planc.cost_model.parts import split
from planc.cost_model.priced_layers import PricedLayers
from planc.cost_model.quantity import ORDER, Quantity, worst
from planc.cost_model.rank_ops import Collective, Kernel
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable

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
    launches                  host time beside kernels, to launch them and, where the host overlaps them, for
                              each sequence: the step takes no less than this
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
            costs = costs_for(gpu, profile) if costs is None else costs
            layers = PricedLayers(table, shape, gpu, fabric, profile, fusions, costs, max_num_seqs)
        else:
            layers = like.layers
        self.layers: PricedLayers = layers
        self._stages = stages(table, shape)
        order = {c.name: i for i, c in enumerate(table.classes)}
        self._kernel_calls = _calls(layers.kernels, self._stages, order, layers.index, len(layers.unique))
        links = layers.collectives
        self._collective_calls = _calls(links, self._stages, order, range(len(links)), len(links))
        attention = [kernel for kernel in layers.kernels if kernel.part != "step"]
        launched = Launches(profile).per_stage
        self._launches = np.array(
            [launched([*layers.kernels, *links], s.counts, order) for s in self._stages]
        )
        self._between_graphs = np.array(
            [len(s.layers) + launched(attention, s.counts, order) for s in self._stages]
        )

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Decode batches that have a CUDA graph; others are padded to the next. () without graphs."""
        return tuple(int(size) for size in self.layers.graphs)

    @cached_property
    def source(self) -> Provenance:
        """The least well founded of the links and of the kernels, leaving aside kernels that together take
        less than a tenth of the kernels' time in a typical step. "fitted" at best: what an engine adds to
        its kernels is fitted."""
        times, _ = self.layers.times(_TYPICAL.arrays())
        each = self._kernel_calls.sum(axis=0) * times.seconds[:, 0]
        enough, taken = _NEGLIGIBLE * float(each.sum()), 0.0
        kernels: Provenance = self.layers.costs.source
        for source in reversed(ORDER):
            taken += float(sum(t for t, of in zip(each, self.layers.sources, strict=True) if of == source))
            if taken > enough:
                kernels = source
                break
        return worst(
            ["fitted", kernels, *self.layers.link_sources(), *(link.source for link in self._hops())]
        )

    @property
    def band(self) -> tuple[float, float]:
        """(low, high) factors on the seconds."""
        return efficiencies().band(self.source)

    def quantity(self, seconds: float) -> Quantity:
        """Seconds with this model's band and provenance."""
        return Quantity.within(seconds, self.band, self.source)

    @property
    def launches(self) -> float:
        """Kernels of a step, over all stages."""
        counts = dict(zip((cls.name for cls in self.table.classes), self._counts(), strict=True))
        return sum(k.calls * k.launches * counts[k.layer_class] for k in self.layers.kernels)

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
        times, _ = self.layers.times(load.arrays())
        counts = dict(zip((cls.name for cls in self.table.classes), self._counts(), strict=True))
        return [
            (kernel, times.seconds[index] * (kernel.calls * counts[kernel.layer_class]))
            for kernel, index in zip(self.layers.kernels, self.layers.index, strict=True)
        ]

    def layer_seconds(self, load: StepLoad) -> tuple[Array, Array]:
        """What one layer of each class adds to its stage, s, [classes, N] each: kernels, collectives and the
        engine's time per numbered layer; and host time to launch them, below which no stage gets."""
        flat = load.arrays()
        times, links = self.layers.times(flat)
        order = {cls.name: at for at, cls in enumerate(self.table.classes)}
        factor, per_launch = self.profile.kernel_factor, self._per_launch(flat)
        launched = Launches(self.profile).per_layer
        layer_s = np.array([[self.profile.layer_us * 1e-6 * is_layer(cls)] for cls in self.table.classes])
        device, launches = np.tile(layer_s, flat.size), np.zeros((len(order), flat.size))
        for kernel, index in zip(self.layers.kernels, self.layers.index, strict=True):
            device[order[kernel.layer_class]] += factor * kernel.calls * times.seconds[index]
            launches[order[kernel.layer_class]] += launched(kernel) * per_launch
        for item, row in zip(self.layers.collectives, links, strict=True):
            device[order[item.layer_class]] += factor * item.calls * row
            launches[order[item.layer_class]] += launched(item) * per_launch
        return device, launches

    def joint_seconds(self, load: StepLoad) -> Array:
        """What a step takes because of the tokens of all attention ranks, s, [N]: routed experts and the
        exchanges around them."""
        flat = load.arrays()
        times, links = self.layers.times(flat)
        counts = dict(zip((cls.name for cls in self.table.classes), self._counts(), strict=True))
        found = np.zeros(flat.size)
        for kernel, index in zip(self.layers.kernels, self.layers.index, strict=True):
            if isinstance(kernel.spec, GroupedGemm):
                found += times.seconds[index] * kernel.calls * counts[kernel.layer_class]
        for item, row in zip(self.layers.collectives, links, strict=True):
            if item.ranks > self.shape.tp:
                found += row * item.calls * counts[item.layer_class]
        return self.profile.kernel_factor * found

    def _per_launch(self, load: Load) -> Array:
        """Host seconds per kernel, [N]: none where the step replays a graph."""
        graphed = (load.tokens == 0) & (
            load.seqs <= (self.layers.graphs[-1] if self.layers.graphs.size else 0.0)
        )
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
        times, links = self.layers.times(flat)
        order = {c.name: i for i, c in enumerate(self.table.classes)}
        counts = self._stages[stage].counts
        features = {
            part: {name: float(value) for name, value in zip(self.layers.names, values[:, 0], strict=True)}
            for part, values in self.layers.features(flat).items()
        }
        found = []
        for kernel, index in zip(self.layers.kernels, self.layers.index, strict=True):
            calls = kernel.calls * counts[order[kernel.layer_class]]
            total = float(times.seconds[index, 0] * calls)
            bound = BOUNDS[int(times.bound[index, 0])]
            if total > 0:
                site, source = "+".join(kernel.sites), self.layers.sources[index]
                what = done(kernel, features[kernel.part])
                found.append(StepPart(kernel.layer_class, site, kernel.op, total, bound, source, calls, what))
        for item, row, source in zip(self.layers.collectives, links, self.layers.link_sources(), strict=True):
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
        if self.layers.mixed_decode > 1.0:
            device = device + np.where(load.tokens > 0, (self.layers.mixed_decode - 1.0) * pieces.decode, 0.0)
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
        times, links = self.layers.times(load)
        factor = self.profile.kernel_factor
        shared, decode, prefill = (
            factor * (self._kernel_calls[:, kernels] @ times.seconds[kernels])
            + factor * (self._collective_calls[:, moves] @ links[moves])
            for kernels, moves in self.layers.by_part
        )
        rows, per_launch = load.seqs + load.tokens, self._per_launch(load)
        fixed = self.profile.step_eager_us if self.shape.eager else self.profile.step_us
        layers = np.array([[len(stage.layers)] for stage in self._stages])
        each = self.profile.per_sequence_us * (self.shape.pp * load.seqs + load.chunks)
        host = ((fixed + each) * self.gpu.host_slowdown + self.profile.layer_us * layers) * 1e-6
        piecewise = 0 if self.shape.eager else self.profile.cuda_graphs.piecewise
        launched = np.where(rows <= piecewise, self._between_graphs[:, None], self._launches[:, None])
        hidden = self.profile.hidden_sequence_us * self.gpu.host_slowdown * 1e-6 * self.asynchronous
        launches = launched * per_launch + hidden * (load.seqs + load.chunks)
        return Pieces(shared, decode, prefill, launches, self._hand_over(rows) + host)

    def _hand_over(self, tokens: Array) -> Array:
        """Activations to the next stage, [stages, N]; the last one hands over nothing."""
        if self.shape.pp == 1:
            return np.zeros((1, tokens.size))
        size = tokens * self.table.model.hidden * fmt(unquantized(self.shape)).bytes / self.shape.tp
        hops = [seconds("p2p", size, 2, link) for link in self._hops()]
        return np.stack([*hops, np.zeros_like(size)])


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


def _slice(load: Load, start: int, stop: int) -> Load:
    part = slice(start, stop)
    return Load(load.seqs[part], load.context[part], load.tokens[part], load.chunks[part], load.cached[part])
