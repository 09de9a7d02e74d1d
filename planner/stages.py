"""Pipeline cuts for layers that are not alike: embedding, head, dense before MoE, windows beside full.

`cut` is exact: over all ways to cut layers into contiguous stages it finds the least time of the slowest
stage, and among those ways the least weight of the heaviest (dynamic programming over the position of each
cut, O(stages layers^2); the linear partition problem). `with_cuts` gives candidate engines such cuts, on
the times that their own step model has for a layer of each class.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planc.cost_model.features import StepLoad
from planc.cost_model.local import is_layer, stages
from planc.cost_model.memory import kept_by, state_bytes, weight_bytes
from planc.cost_model.step import StepModel
from planc.planner.candidates import Candidate
from planc.planner.traffic import Traffic

Array = NDArray[np.float64]

#: stage -> cost of layers [start, end) in that stage, [layers + 1, layers + 1]; infinite from start = end on
Spans = Callable[[int], Array]

#: engines that can be told which layers a stage holds (vLLM: VLLM_PP_LAYER_PARTITION)
UNEVEN = frozenset({"vllm"})

#: sequences that decode together, and prompt tokens of one step, for which stages are balanced
_SEQUENCES, _CHUNK = 64, 2048

#: a cut is worth telling the engine where steps are faster by this share
_WORTH = 0.02

#: relative slack when sums of the same times in another order are compared
_SAME = 1e-12


def spans(values: Sequence[float], stage_count: int, ends: tuple[float, float] = (0.0, 0.0)) -> Spans:
    """Sums over layers; `ends` is what the first and the last stage have besides."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    inner = np.where(np.tri(sums.size, dtype=bool), np.inf, sums[None, :] - sums[:, None])
    return lambda stage: inner + ends[0] * (stage == 0) + ends[1] * (stage == stage_count - 1)


def cut(
    layers: int,
    stage_count: int,
    seconds: Spans,
    weight: Spans | None = None,
    limit: float = float("inf"),
) -> tuple[int, ...] | None:
    """Layers of each stage: the slowest stage is as fast as can be, then the heaviest as light as can be.

    seconds, weight   of stages, which have a layer at least; none may weigh more than the limit

    None where no cut keeps to the limit, or there are more stages than layers.
    """
    if not 1 <= stage_count <= layers:
        return None
    if weight is None:
        return _best(layers, stage_count, seconds)[1]
    fits = lambda stage: np.where(weight(stage) <= limit, seconds(stage), np.inf)  # noqa: E731
    slowest, sizes = _best(layers, stage_count, fits)
    if sizes is None:
        return None
    fast = slowest * (1 + _SAME)
    return _best(layers, stage_count, lambda stage: np.where(fits(stage) <= fast, weight(stage), np.inf))[1]


def _best(layers: int, stage_count: int, cost: Spans) -> tuple[float, tuple[int, ...] | None]:
    """Least of the greatest cost of a stage, and layers of each stage that reach it."""
    least = np.full(layers + 1, np.inf)
    least[0] = 0.0
    starts = []
    for stage in range(stage_count):
        worst = np.maximum(least[:, None], cost(stage))
        starts.append(worst.argmin(axis=0))
        least = worst.min(axis=0)
    if not np.isfinite(least[layers]):
        return np.inf, None
    sizes: list[int] = []
    end = layers
    for start in reversed(starts):
        sizes.append(end - int(start[end]))
        end = int(start[end])
    return float(least[layers]), tuple(reversed(sizes))


# -- cuts of candidate engines -----------------------------------------------------------


def with_cuts(
    candidates: Sequence[Candidate], traffic: Traffic, model: Callable[[Candidate], StepModel]
) -> list[Candidate]:
    """The candidates, and those pipelines again with the cut that suits their layers, where that is faster.

    The even split stays on offer: it may leave more room for the cache. model: step times of a candidate.
    """
    found: list[Candidate] = []
    known: dict[object, Layers] = {}  # layers cost the same however many stages share them out
    for candidate in candidates:
        found.append(candidate)
        shape = candidate.shape
        if shape.pp == 1 or shape.engine not in UNEVEN or shape.pipeline_layers:
            continue
        even = model(candidate)
        key = replace(shape, pp=1), candidate.group.index
        if key not in known:
            known[key] = Layers(even, traffic)
        sizes = known[key].balanced(even)
        if sizes is not None:
            found.append(replace(candidate, shape=replace(shape, pipeline_layers=sizes)))
    return found


class Layers:
    """What the layers of an engine cost on one rank, in the steps that are usual under a traffic."""

    def __init__(self, model: StepModel, traffic: Traffic) -> None:
        steps = typical(traffic)
        self.traffic = traffic
        self.shares = np.array([share for share, _ in steps])
        self.device, self.launches = model.layer_seconds(_stacked([load for _, load in steps]))
        order = {
            layer: at for at, cls in enumerate(model.table.classes) if is_layer(cls) for layer in cls.layers
        }
        self.layers = [order[layer] for layer in sorted(order)]

    def balanced(self, even: StepModel) -> tuple[int, ...] | None:
        """The best cut for an engine's stages; None where its even split is about as good."""
        pp, held = even.shape.pp, stages(even.table, even.shape)
        loose = [at for at, cls in enumerate(even.table.classes) if not is_layer(cls)]

        def over(values: Sequence[float]) -> Spans:
            first, last = (
                sum(values[at] * stage.counts[at] for at in loose) for stage in (held[0], held[-1])
            )
            return spans([values[at] for at in self.layers], pp, (first, last))

        pairs = [
            (share, over(device.tolist()), over(launches.tolist()))
            for share, device, launches in zip(self.shares, self.device.T, self.launches.T, strict=True)
            if share > 0
        ]

        def seconds(stage: int) -> Array:
            found: Array = sum(share * np.maximum(a(stage), b(stage)) for share, a, b in pairs)  # type: ignore[assignment]
            return found

        def slowest(sizes: Sequence[int]) -> float:
            bounds = [0, *itertools.accumulate(sizes)]
            pieces = enumerate(itertools.pairwise(bounds))
            return max(float(seconds(stage)[first, last]) for stage, (first, last) in pieces)

        usual = tuple(len(stage.layers) for stage in held)
        sizes = cut(len(self.layers), pp, seconds)
        if sizes is None or slowest(sizes) > slowest(usual) * (1 - _WORTH):
            return None
        weight = over([self._bytes(even, at) for at in range(len(even.table.classes))])
        return cut(len(self.layers), pp, seconds, weight)

    def _bytes(self, model: StepModel, index: int) -> float:
        """One layer of a class: weights, and the cache and states of usual sequences."""
        table, shape = model.table, model.shape
        context = self.traffic.decode_context if self.traffic.decode_steps else self.traffic.isl_mean
        counts = tuple(int(at == index) for at in range(len(table.classes)))
        cache = sum(part.bytes_per_token * min(context, part.limit) for part in kept_by(table, shape, counts))
        states = state_bytes(table, shape, counts)
        return weight_bytes(table, shape, counts) + (cache + states) * _SEQUENCES


def typical(traffic: Traffic) -> list[tuple[float, StepLoad]]:
    """Steps of one rank under this traffic, and the share of each: with decoding sequences, with prompts."""
    if traffic.decode_steps == 0:
        return [(1.0, StepLoad(0, 0, _CHUNK, 1))]
    chunk = min(traffic.new_tokens, _CHUNK)
    decode = StepLoad(_SEQUENCES, traffic.decode_context)
    if chunk <= 0:
        return [(1.0, decode)]
    share = min(_SEQUENCES * traffic.new_tokens / traffic.decode_steps / chunk, 1.0)
    return [(1.0 - share, decode), (share, replace(decode, prefill_tokens=chunk, prefill_seqs=1))]


def _stacked(loads: Sequence[StepLoad]) -> StepLoad:
    names = ("decode_seqs", "decode_context", "prefill_tokens", "prefill_seqs", "prefill_context")
    return StepLoad(*(np.array([getattr(load, name) for load in loads], dtype=float) for name in names))
