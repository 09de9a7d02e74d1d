"""Where the routed experts of a layer lie, with copies of the busy ones: longest first, then swaps.

Each of G ranks has the same number of slots; G slots - E of them hold second copies. Copies of an expert
share its tokens evenly, as engines' load balancers do. First every free slot goes to the expert whose
copies are busiest, which makes the busiest copy as light as can be; then copies are dealt out, heaviest
first, to the lightest rank with a free slot (Graham 1969), and pairs are exchanged between the fullest rank
and others while that lowers the fuller of the two. No placement gets below

    max(all tokens / G, max over experts of tokens / copies)

and with c_e copies of the most even kind the second term is least, so it bounds every placement. Layers of
few slots are solved by CP-SAT besides, copies and all, where the bound is not reached.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planc.errors import InvalidField

Array = NDArray[np.float64]

#: (experts, ranks) pairs up to which all placements are searched, and CP-SAT's deterministic seconds for it
_SMALL, _WORK = 64, 2.0

#: whole units of load in the heaviest rank that is possible
_UNITS = 10**7


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """One layer's experts on its ranks.

    experts   [ranks, slots]: the expert in each slot
    copies    [experts]
    tokens    [ranks]: what each rank carries, in the unit of the load
    bound     no placement with as many slots has a fullest rank below it
    """

    experts: NDArray[np.intp]
    copies: NDArray[np.intp]
    tokens: Array
    bound: float

    @property
    def imbalance(self) -> float:
        """The fullest rank over the mean; 1 where there is no load."""
        mean = float(self.tokens.mean())
        return float(self.tokens.max()) / mean if mean else 1.0

    @property
    def gap(self) -> float:
        """How far the fullest rank is above the bound, as a share of it."""
        return float(self.tokens.max()) / self.bound - 1.0 if self.bound else 0.0


def place_experts(load: ArrayLike, ranks: int, extra: int = 0) -> ExpertPlacement:
    """Places experts with these loads [experts] on ranks of experts // ranks + extra slots each.

    Raises InvalidField for loads that are none, experts that have no slots for all, and more slots
    than copies can fill (a rank holds an expert once).
    """
    tokens = np.asarray(load, dtype=np.float64)
    _validate(tokens, ranks, extra)
    slots = tokens.size // ranks + extra
    copies = _copies(tokens, ranks, slots * ranks)
    each = tokens / copies
    bound = max(float(tokens.sum()) / ranks, float(each.max()))
    held = _dealt(np.repeat(np.arange(tokens.size), copies), each, ranks, slots)
    held = _swapped(held, each, bound)
    found = ExpertPlacement(held, copies, each[held].sum(axis=1), bound)
    if tokens.size * ranks > _SMALL or found.gap <= 1e-9:
        return found
    return _searched(tokens, ranks, slots, found)


def contiguous(load: ArrayLike, ranks: int) -> ExpertPlacement:
    """The placement of engines that are told nothing: experts in their order, a share to each rank."""
    tokens = np.asarray(load, dtype=np.float64)
    _validate(tokens, ranks, 0)
    held = np.arange(tokens.size).reshape(ranks, -1)
    bound = max(float(tokens.sum()) / ranks, float(tokens.max()))
    return ExpertPlacement(held, np.ones(tokens.size, dtype=np.intp), tokens[held].sum(axis=1), bound)


def _copies(tokens: Array, ranks: int, slots: int) -> NDArray[np.intp]:
    """One copy of each expert, and every further slot to the expert whose copies are busiest."""
    copies = np.ones(tokens.size, dtype=np.intp)
    heap = [(-float(load), expert) for expert, load in enumerate(tokens)]
    heapq.heapify(heap)
    for _ in range(slots - tokens.size):
        while copies[heap[0][1]] >= ranks:
            heapq.heappop(heap)
        expert = heap[0][1]
        copies[expert] += 1
        heapq.heapreplace(heap, (-float(tokens[expert]) / int(copies[expert]), expert))
    return copies


def _dealt(items: NDArray[np.intp], each: Array, ranks: int, slots: int) -> NDArray[np.intp]:
    """Heaviest first to the lightest rank with room that has no copy of the same expert.

    Copies of an expert are dealt together, so with room left on as many ranks there is always one.
    """
    order = sorted(set(items.tolist()), key=lambda expert: (-each[expert], expert))
    count = np.bincount(items, minlength=each.size)
    held: list[list[int]] = [[] for _ in range(ranks)]
    filled = np.zeros(ranks)
    left = int(items.size)
    for expert in order:
        need = int(count[expert])
        for _ in range(need):
            able = [r for r in range(ranks) if len(held[r]) < slots and expert not in held[r]]
            rank = min(able, key=lambda r: (filled[r], len(held[r]), r)) if able else -1
            if rank < 0:
                rank = _exchange(held, expert, slots, filled, each)
            held[rank].append(expert)
            filled[rank] += each[expert]
            left -= 1
    return np.array([sorted(rank) for rank in held], dtype=np.intp)


def _exchange(held: list[list[int]], expert: int, slots: int, filled: Array, each: Array) -> int:
    """Makes room for a copy of an expert that every rank with room already holds: another copy moves there
    from a rank without it. Returns that rank."""
    for target in (r for r in range(len(held)) if len(held[r]) < slots):
        for source in (r for r in range(len(held)) if expert not in held[r]):
            for other in held[source]:
                if other not in held[target]:
                    held[source].remove(other)
                    held[target].append(other)
                    filled[source] -= each[other]
                    filled[target] += each[other]
                    return source
    raise AssertionError("copies never outnumber ranks")


def _swapped(held: NDArray[np.intp], each: Array, bound: float) -> NDArray[np.intp]:
    """Exchanges a copy on the fullest rank for a lighter one while the fuller of both gets lighter."""
    held = held.copy()
    filled = each[held].sum(axis=1)
    for _ in range(20 * held.size):
        full = int(filled.argmax())
        if filled[full] <= bound * (1 + 1e-12):
            break
        mine, load = held[full], each[held[full]]
        # delta[r, a, b]: what the fullest rank sheds when its slot a goes to rank r for slot b
        delta = load[None, :, None] - each[held][:, None, :]
        after = np.maximum(filled[full] - delta, filled[:, None, None] + delta)
        doubled = (held[:, None, :] == mine[None, :, None]).any(axis=2)[:, :, None]
        returned = (held[:, :, None] == mine[None, None, :]).any(axis=2)[:, None, :]
        after = np.where(doubled | returned, np.inf, after)
        after[full] = np.inf
        rank, a, b = np.unravel_index(int(after.argmin()), after.shape)
        if after[rank, a, b] >= filled[full] * (1 - 1e-12):
            break
        held[full, a], held[rank, b] = held[rank, b], held[full, a]
        filled[full] = each[held[full]].sum()
        filled[rank] = each[held[rank]].sum()
    return np.sort(held, axis=1)


def _searched(tokens: Array, ranks: int, slots: int, known: ExpertPlacement) -> ExpertPlacement:
    """The best of all placements by CP-SAT, or the known one where that is as good."""
    from ortools.sat.python import cp_model

    model, experts = cp_model.CpModel(), range(tokens.size)
    scale = _UNITS / float(tokens.sum())
    holds = [[model.new_bool_var("") for _ in range(ranks)] for _ in experts]
    fullest = model.new_int_var(0, _UNITS, "")
    on_rank: list[list[cp_model.LinearExprT]] = [[] for _ in range(ranks)]
    for expert in experts:
        chosen = [model.new_bool_var("") for _ in range(ranks)]  # as many copies
        model.add_exactly_one(chosen)
        model.add(sum(holds[expert]) == sum(count * one for count, one in enumerate(chosen, 1)))
        share = model.new_int_var(0, _UNITS, "")
        pieces = [round(float(tokens[expert]) * scale / count) for count in range(1, ranks + 1)]
        model.add(share == sum(piece * one for piece, one in zip(pieces, chosen, strict=True)))
        for rank in range(ranks):
            load = model.new_int_var(0, _UNITS, "")
            model.add(load == share).only_enforce_if(holds[expert][rank])
            on_rank[rank].append(load)
            model.add_hint(holds[expert][rank], expert in known.experts[rank])
    for rank in range(ranks):
        model.add(sum(holds[expert][rank] for expert in experts) == slots)
        model.add(sum(on_rank[rank]) <= fullest)
    model.minimize(fullest)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers, solver.parameters.random_seed = 1, 0
    solver.parameters.max_deterministic_time = _WORK
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return known
    rows = [[expert for expert in experts if solver.value(holds[expert][rank])] for rank in range(ranks)]
    held = np.array(rows, dtype=np.intp)
    copies = np.bincount(held.reshape(-1), minlength=tokens.size)
    found = ExpertPlacement(held, copies, (tokens / copies)[held].sum(axis=1), known.bound)
    return found if found.tokens.max() < known.tokens.max() * (1 - 1e-9) else known


def _validate(tokens: Array, ranks: int, extra: int) -> None:
    def wrong(field: str, value: object, reason: str, mend: str) -> InvalidField:
        return InvalidField(where="expert placement", field=field, value=value, reason=reason, mend=mend)

    if tokens.ndim != 1 or not tokens.size:
        raise wrong("load", tokens.shape, "not one number per expert", "Give the tokens of every expert.")
    if not (np.isfinite(tokens).all() and (tokens >= 0).all()):
        raise wrong("load", float(tokens.min()), "negative or no number", "Give counts of tokens.")
    if ranks < 1 or (tokens.size % ranks and not extra):
        raise wrong(
            "ranks", ranks, f"{tokens.size} experts do not divide by it", "Use a divisor, or extra slots."
        )
    if extra < 0 or (tokens.size // ranks + extra) > tokens.size:
        raise wrong("extra", extra, "a rank holds every expert once at most", "Use fewer extra slots.")


def physical_map(placements: Sequence[ExpertPlacement]) -> list[list[int]]:
    """Per layer the expert in each slot, ranks one after the other: SGLang's physical_to_logical_map."""
    return [placement.experts.reshape(-1).tolist() for placement in placements]
