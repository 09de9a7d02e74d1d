"""The analytic evaluator: what each candidate can carry, for all candidates and limits at once.

`Bench` stacks one row per (candidate, token budget, batch cap). Curves of step times are tabulated
once per candidate; everything after is array arithmetic. What the search picks is evaluated again
with the step model itself (`exact`), and the search is told when the two disagree.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from planc.cost_model.catalogue import GIB
from planc.cost_model.memory import Contents, MemoryMap, contents, memory_map
from planc.cost_model.offload import Reuse, Tier, constants, reuse
from planc.cost_model.speculative import Drafting, drafting, with_draft
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable
from planc.errors import InvalidField
from planc.planner.candidates import TOKEN_BUDGETS, Candidate
from planc.planner.operating_point import Array, Steady
from planc.planner.priors import priors
from planc.planner.request import Constraints, Request, Slo
from planc.planner.steady_state import steady
from planc.planner.step_times import Curves, Exact
from planc.planner.traffic import Part, Traffic

_LOADS = 40
_ITERATIONS, _NEAR = 30, 18  # halvings: of all batches, between two of the grid
_POINTS = 40
_ZOOMS = 3
_CROWDED = 0.97  # share of seats at which the upper end of a band is read off


@dataclass(frozen=True, slots=True)
class Limits:
    """Batch limits of one engine. `seats`: sequences that really run at once, the lesser of the cap
    and what the cache holds with a margin."""

    max_num_seqs: int
    budget: int
    seats: int


@dataclass(frozen=True, slots=True)
class Engine:
    """A candidate, ready to be evaluated. `transfer_s`: seconds that the cache of a usual prompt takes to
    reach it, where it decodes what others prefilled. `reuse`: what it finds of prompts, where its caches may
    not hold all that recurs."""

    candidate: Candidate
    model: StepModel
    limits: tuple[Limits, ...]
    transfer_s: float = 0.0
    reuse: Reuse | None = None

    @property
    def draft(self) -> Drafting | None:
        """What speculation adds to its steps."""
        speculation = self.candidate.speculation
        return drafting(speculation, self.model) if speculation else None


def cache_seats(traffic: Traffic, memory: MemoryMap) -> float:
    """Sequences B whose cache demand fits with a margin: B m + z s sqrt(B) <= cache bytes."""
    context = traffic.decode_context
    mean = float(memory.sequence_bytes(context)) + memory.kv_bytes_per_token * memory.block_size / 2
    spread = float(memory.sequence_bytes(context + traffic.resident_sd)) - float(
        memory.sequence_bytes(context)
    )
    spread *= priors().kv_margin_sd
    root = (-spread + math.sqrt(spread * spread + 4 * mean * memory.kv_cache)) / (2 * mean)
    return root * root


def prompt_seats(traffic: Traffic, memory: MemoryMap) -> float:
    """Prompts of the usual length whose cache fits; long ones stay longer, so they weigh more."""
    context = traffic.mean(traffic.isl**2) / max(traffic.isl_mean, 1.0)
    return float(memory.sequences(context))


def _caps(traffic: Traffic, caps: Sequence[int], budgets: Sequence[int], budget: int) -> Sequence[int]:
    """Batch caps to try at a token budget, of ascending ones."""
    if traffic.role == "prefill":
        return [next((cap for cap in caps if cap * traffic.new_tokens >= budget), caps[-1])]
    if traffic.role == "decode":
        smaller = max((other for other in budgets if other < budget), default=0)
        return [cap for cap in caps if cap > smaller]
    return caps


@dataclass(frozen=True, slots=True)
class Memories:
    """What is known of engines' memory, for searches of one request to share."""

    maps: dict[tuple[object, ...], MemoryMap] = field(default_factory=dict)
    contents: dict[tuple[object, ...], Contents] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory questions about one candidate under one traffic, of which it does the part of its role."""

    table: CostTable
    candidate: Candidate
    traffic: Traffic
    max_model_len: int
    utilization: float | None
    role: Part = "aggregated"
    known: Memories = field(default_factory=Memories, compare=False)

    def memory(self, cap: int, budget: int) -> MemoryMap:
        """The memory map with these limits; `known` ones, which searches of one request share, are kept."""
        one = self.candidate
        key = (one.shape, one.speculation, one.group.gpu.name, cap, budget)
        if key not in self.known.maps:
            table, mine = with_draft(self.table, one.speculation), (one.shape, one.speculation)
            if mine not in self.known.contents:
                self.known.contents[mine] = contents(table, one.shape)
            self.known.maps[key] = memory_map(
                table,
                one.shape,
                one.group.gpu,
                one.profile,
                max_num_seqs=cap,
                max_num_batched_tokens=budget,
                max_model_len=self.max_model_len,
                utilization=self.utilization,
                held=self.known.contents[mine],
            )
        return self.known.maps[key]

    def seats(self, cap: int, budget: int) -> int:
        """Sequences that run at once; 0 when the engine would not start."""
        memory = self.memory(cap, budget)
        if not memory.fits:
            return 0
        if not memory.kept:
            return cap
        traffic = self.traffic.of(self.role)
        held = prompt_seats(traffic, memory) if traffic.role == "prefill" else cache_seats(traffic, memory)
        return min(cap, int(held * self.candidate.shape.cp))

    def engine(self, model: StepModel, limits: tuple[Limits, ...]) -> Engine:
        """The candidate with its limits, ready to be evaluated."""
        return Engine(self.candidate, model, limits, reuse=self.reuse(model, limits))

    def reuse(self, model: StepModel, limits: Sequence[Limits]) -> Reuse | None:
        """What is found of prompts by an engine whose caches need not hold all that recurs; None: all of it.

        Its share of the machine's other memory is that of its GPUs. On the GPU prefixes have what the running
        sequences of the largest limits leave. Prefill pools load nothing: their connector is taken.
        """
        flow, working = self.traffic.of(self.role), self.traffic.prefix_tokens
        if working is None or not flow.hit_rate or flow.role == "decode" or not limits:
            return None
        most = max(limits, key=lambda item: (item.seats, item.budget))
        memory = self.memory(most.max_num_seqs, most.budget)
        cp = self.candidate.shape.cp
        each = memory.kv_bytes_per_token / cp
        if not each:
            return None
        running = most.seats * (flow.decode_context if flow.decode_steps else flow.isl_mean)
        held = memory.kv_tokens * cp
        room = max(held - running, constants()["resident"] * held)
        tiers = [Tier("gpu", room * self.candidate.shape.dp)]
        if flow.role == "aggregated":
            ranks = self.candidate.shape.dp
            tiers += [
                Tier(name, gib * GIB / each * ranks, speed)
                for name, gib, speed in self.candidate.group.stores
            ]
        chunk = max(min(flow.isl_mean, 4096.0), 1.0)
        seconds = float(model.seconds(StepLoad(0.0, 0.0, chunk, 1.0, flow.isl_mean / 2))) / chunk
        return reuse(flow.hit_rate, flow.isl_mean, working, tiers, each, seconds)

    def all(self, caps: Sequence[int], budgets: Sequence[int]) -> tuple[Limits, ...]:
        """All limits worth trying. Memory only shrinks with either limit, so what fits at the largest
        pair fits everywhere, and a cap beyond what the cache holds adds nothing. Prompts alone need the
        smallest cap that fills a step, decoding alone the smallest budget that holds a step."""
        found: list[Limits] = []
        traffic = self.traffic.of(self.role)
        everywhere = self.seats(max(caps), max(budgets))
        rows = self.candidate.speculation.rows if self.candidate.speculation else 1
        for budget in sorted(budgets):
            for cap in _caps(traffic, sorted(caps), sorted(budgets), budget):
                if traffic.decode_steps and rows * cap > budget:
                    break
                seats = cap if cap <= everywhere else self.seats(cap, budget)
                if seats >= 1:
                    found.append(Limits(cap, budget, seats))
                if seats < cap:
                    break
        return tuple(found)


def token_budgets(table: CostTable, traffic: Traffic, allowed: Constraints) -> tuple[int, ...]:
    """Token budgets to try. Encoders cannot cut a prompt in pieces, modules count items."""
    listed = tuple(allowed.max_num_batched_tokens or TOKEN_BUDGETS)
    if table.model.kind == "causal_lm":
        return listed
    longest = int(traffic.isl.max())
    return tuple(b for b in listed if b >= longest) or (longest,)


class Bench:
    """All rows of some engines under one traffic, of which they do the part of their role."""

    def __init__(self, engines: Sequence[Engine], traffic: Traffic, role: Part = "aggregated") -> None:
        self.engines, self.traffic = list(engines), traffic.of(role)
        traffic = self.traffic
        parts, index, owner, flat = [], [], [], []
        start = 0
        for number, engine in enumerate(self.engines):
            budgets = sorted({full_step(item, traffic) for item in engine.limits})
            parts.append(Curves.of(engine.model, found_by(engine, traffic), budgets, engine.draft))
            for item in engine.limits:
                index.append(start + budgets.index(full_step(item, traffic)))
                owner.append(number)
                flat.append(item)
            start += len(budgets)
        self.limits: list[Limits] = flat
        self.owner = np.array(owner, dtype=np.intp)
        self.seats = np.array([item.seats for item in flat], dtype=np.float64)[:, None]
        self.times = Curves.stacked(parts).rows(np.array(index, dtype=np.intp)) if parts else None
        self.transfer_s = np.array([engine.transfer_s for engine in self.engines])[self.owner][:, None]
        own = [(found_by(e, traffic).new_tokens, e.reuse.load_s if e.reuse else 0.0) for e in self.engines]
        self.prompts = np.array(own, dtype=np.float64).reshape(-1, 2)[self.owner]

    def only(self, rows: Sequence[int]) -> Bench:
        """Some of the rows."""
        assert self.times is not None
        other, index = copy.copy(self), np.array(rows, dtype=np.intp)
        other.limits = [self.limits[row] for row in rows]
        other.owner, other.seats = self.owner[index], self.seats[index]
        other.times, other.transfer_s = self.times.rows(index), self.transfer_s[index]
        other.prompts = self.prompts[index]
        return other

    def steady(self, batch: Array) -> Steady:
        assert self.times is not None
        fresh, load_s = self.prompts[:, :1], self.prompts[:, 1:]
        return steady(
            self.times,
            self.traffic,
            batch,
            self.seats,
            transfer_s=self.transfer_s,
            fresh=fresh,
            load_s=load_s,
        )

    def engine_load(self, state: Steady) -> Array:
        """Requests/s, or users of a closed loop, of a whole engine."""
        assert self.times is not None
        return self.times.dp * (state.rate if self.traffic.concurrency is None else state.users)

    def capacities(self, slos: tuple[Slo, ...]) -> tuple[Array, Counter[str]]:
        """[N] highest load of an engine of each row that meets every objective (0: none does), and
        for how many rows each objective fails at the lightest load."""
        if self.times is None:
            return np.zeros(0), Counter()
        grid = np.geomspace(1e-3, 1.0, _LOADS)[None, :] * self.seats
        light = self.steady(grid)
        good = light.meets(slos)
        failing: Counter[str] = Counter()
        dead = ~good[:, 0]
        for slo in slos:
            missed = int(np.sum(light.value(slo)[dead, 0] > slo.limit))
            if missed:
                failing[slo.key] = missed
        last = np.where(good.all(axis=1), _LOADS, np.argmin(good, axis=1)) - 1
        row = np.arange(len(grid))
        low = grid[row, last][:, None]
        high = grid[row, np.minimum(last + 1, _LOADS - 1)][:, None]
        for _ in range(_NEAR):
            middle = np.sqrt(low * high)
            ok = self.steady(middle).meets(slos)
            low, high = np.where(ok, middle, low), np.where(ok, high, middle)
        best = self.engine_load(self.steady(low))[:, 0]
        return np.where(dead, 0.0, best), failing

    def at_load(self, load: Array) -> Steady:
        """The steady state at a load per engine [N or 1, K]; infinite TTFT where it cannot be carried."""
        assert self.times is not None
        shape = np.broadcast_shapes(load.shape, (len(self.seats), load.shape[1]))
        low, high = np.full(shape, 1e-9), np.broadcast_to(self.seats, shape).copy()
        top = self.engine_load(self.steady(high))
        over = load > top * (1 + 1e-9)
        for _ in range(_ITERATIONS):
            middle = np.sqrt(low * high)
            less = self.engine_load(self.steady(middle)) < load
            low, high = np.where(less, middle, low), np.where(less, high, middle)
        state = self.steady(high)
        state.ttft[np.broadcast_to(over, shape)] = np.inf
        return state


class Precise:
    """One engine with fixed limits, evaluated by the step model itself. Loads are those of the whole
    engine: requests/s, or users of a closed loop."""

    def __init__(self, engine: Engine, limits: Limits, traffic: Traffic, role: Part = "aggregated") -> None:
        self.engine, self.limits, self.traffic = engine, limits, traffic.of(role)
        own = found_by(engine, self.traffic)
        self.fresh, self.load_s = own.new_tokens, engine.reuse.load_s if engine.reuse else 0.0
        self.times = Exact.of(engine.model, own, full_step(limits, self.traffic), engine.draft)
        self.seats = np.array([[float(limits.seats)]])

    def state(self, batch: Array, scale: float = 1.0) -> Steady:
        return steady(
            self.times,
            self.traffic,
            batch[None, :],
            self.seats,
            scale,
            transfer_s=self.engine.transfer_s,
            fresh=self.fresh,
            load_s=self.load_s,
        )

    def load(self, state: Steady) -> Array:
        dp = self.engine.candidate.shape.dp
        found: Array = dp * (state.rate if self.traffic.concurrency is None else state.users)[0]
        return found

    def _batches(self) -> Array:
        """Batches from next to none up to all seats. Users of a closed loop keep a batch as it is, so the
        ends of the steps that padding to captured graphs makes of the step time are among them: a load may be
        carried just below such an end only."""
        model, seats = self.engine.model, float(self.limits.seats)
        found = np.concatenate([[1e-9], np.geomspace(1e-3, 1.0, _POINTS) * seats])
        if self.traffic.concurrency is not None:
            ends = np.array(model.graph_sizes) * model.shape.pp
            found = np.concatenate([found, ends[ends < seats]])
        return np.unique(found)

    def capacity(self, slos: tuple[Slo, ...]) -> float:
        """The highest load up to which every objective holds; 0 when none does at the lightest load."""
        batch = self._batches()
        best, ends = 0.0, []
        for _ in range(_ZOOMS):
            state = self.state(batch)
            good, loads = state.meets(slos)[0], self.load(state)
            loads = np.where(np.isfinite(state.ttft[0]), loads, np.inf)
            last = len(good) - 1 if good.all() else int(np.argmin(good)) - 1
            if last >= 0:
                best = float(loads[last])
            if (last < 0 and best == 0.0) or last == len(good) - 1:
                break
            ends.append((float(loads[max(last, 0)]), float(loads[last + 1])))
            batch = np.linspace(batch[max(last, 0)], batch[last + 1], _POINTS)
        # a load that only a corner between two batches carries is one that `at` would look for further on
        return next((low for low, high in ends if high < best), best)

    def at(self, load: float, scale: float = 1.0) -> Steady:
        """The steady state at a load. Where it cannot be carried: infinite TTFT, or, with a scale
        above 1 (a band's upper end), the most that still can be."""
        batch = self._batches()
        for _ in range(_ZOOMS + 1):
            state = self.state(batch, scale)
            enough = (self.load(state) >= load) | ~np.isfinite(state.ttft[0])
            if scale > 1:
                enough |= state.full[0] > _CROWDED
            first = int(np.argmax(enough)) if enough.any() else len(batch) - 1
            if first == 0:
                break
            low, high = batch[first - 1], batch[first]
            batch = np.linspace(low, high, _POINTS)
        found = self.state(np.array([high if first else batch[0]]), scale)
        if scale > 1:
            over = not np.isfinite(found.ttft[0, 0]) or found.full[0, 0] > _CROWDED
            return self.state(np.array([low if first else batch[0]]), scale) if over else found
        if self.load(found)[0] < load * (1 - 1e-4):
            found.ttft[:] = np.inf
        return found


def found_by(engine: Engine, traffic: Traffic) -> Traffic:
    """The requests with the share of their prompts that this engine finds."""
    return traffic if engine.reuse is None else replace(traffic, hit_rate=engine.reuse.hit_rate)


def full_step(limits: Limits, traffic: Traffic) -> int:
    """Tokens of a full step: without decoding the batch cap bounds them too."""
    if traffic.decode_steps:
        return limits.budget
    prompts = limits.seats if traffic.role == "prefill" else limits.max_num_seqs
    return max(min(limits.budget, int(prompts * traffic.new_tokens)), 1)


def model_len(request: Request, table: CostTable, load: Traffic) -> int:
    """Longest sequence the engine must take: the stated one, else the next power of two above the
    workload's longest request. Raises InvalidField when that exceeds what the model was made for."""
    longest, most = load.longest, table.model.max_position
    stated = request.constraints.max_model_len
    if stated is not None and stated < longest:
        raise InvalidField(
            where="request",
            field="constraints.max_model_len",
            value=stated,
            reason=f"the workload has requests of {longest} tokens",
            mend=f"Give at least {longest}, or shorten isl and osl.",
        )
    if most and (stated or longest) > most:
        raise InvalidField(
            where="request",
            field="constraints.max_model_len" if stated else "workload",
            value=stated or longest,
            reason=f"longer than the model's {most} positions",
            mend=f"Keep isl + osl within {most} tokens.",
        )
    if stated is not None:
        return stated
    wanted = max(1 << math.ceil(math.log2(max(longest, 2))), 2048)
    return min(wanted, most) if most else wanted
