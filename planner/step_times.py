"""Step times for the steady state: exact from one step model, or interpolated for many at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planc.cost_model.speculative import Drafting
from planc.cost_model.step import StepLoad, StepModel
from planc.planner.operating_point import FIRST, Array
from planc.planner.priors import waits
from planc.planner.queues import middle_of
from planc.planner.traffic import Traffic

#: decoding sequences per step at which curves are tabulated; n and n + 1 where kernels change their tiles
_STARTS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 20, 24, 25, 32, 33, 40, 48, 56, 64, 65, 72, 80, 96, 97, 112)
_LARGE = (128, 129, 144, 160, 176, 192, 193, 208, 224, 240, 256, 257, 288, 320, 384, 385, 448, 512, 513)
_FIXED = ("budget", "pp", "dp", "request_s", "lag_steps", "first_token", "per_seq", "pace")
_CURVES = ("decode", "alone", "full", *_FIXED)
#: two points that integrate a cubic over a prompt (Gauss and Legendre)
_GAUSS = 1 / math.sqrt(3)
#: equally likely batches of a normal distribution, of unit variance: two of them, and the means of its sixths
#: (times 1.043), which smooth the staircase of graphs
_FEW, _MANY = (-1.0, 1.0), (-1.564, -0.711, -0.221, 0.221, 0.711, 1.564)
GRID = np.array((*_STARTS, *_LARGE, 640, 768, 769, 896, 1024), dtype=np.float64)


def loads(traffic: Traffic, seqs: Array, room: Array, at: float = 0.0) -> list[StepLoad]:
    """Steps beside `seqs` decoding sequences that have `room` for prompts: without any, with a piece of each
    kind of prompt, and full of them. Where nothing decodes the first has some prompts, the geometric mean of
    one and all that fit, and the last is only so full as steps are that hold many. `at`: where in its prompt
    the last one's lies, 0 in the middle and +-1 at the ends."""
    context, first = traffic.decode_context, 1 - traffic.hit_rate
    if traffic.role == "decode":
        return [StepLoad(seqs, context)]
    if traffic.decode_steps == 0:
        seqs = np.zeros_like(seqs)
    mixed = []
    for _, tokens in traffic.prompts:
        piece = np.where(tokens < room, tokens, room / 2)
        before = np.where(tokens < room, tokens / first - tokens, tokens / first - (tokens + piece) / 2)
        mixed.append(StepLoad(seqs, context, piece, 1.0, np.maximum(before, 0.0)))
    start = traffic.prefill_context + at * traffic.new_tokens / 2
    before = np.maximum(start - (1 + at) * np.minimum(traffic.new_tokens, room) / 2, 0.0)
    prompts = np.maximum(room / traffic.new_tokens, 1.0)
    if traffic.decode_steps:
        return [StepLoad(seqs, context), *mixed, StepLoad(seqs, context, room, prompts, before)]
    some, part = middle_of(prompts), _fullness(traffic, room)
    few = StepLoad(0, 0, np.minimum(some * traffic.new_tokens, room), some, before)
    return [few, *mixed, StepLoad(0, 0, part * room, part * prompts, before)]


def _fullness(traffic: Traffic, room: Array) -> Array:
    """Share of their room that steps of prompts alone are priced at: kernels may like a full step's round
    number of tokens, which steps of several prompts seldom have."""
    return np.where(room >= 4 * traffic.new_tokens, 0.8, 1.0)


def folded(traffic: Traffic, seconds: Sequence[Array], room: Array) -> tuple[Array, Array, Array]:
    """(D, A, F) of `planner.steady_state` from the seconds of `loads`.

    A prompt longer than a step is cut into half a piece more than fits exactly, on average: full ones, and
    the last one half as long.
    """
    decode, *mixed, full = seconds if len(seconds) > 1 else (seconds[0],) * 3
    if traffic.decode_steps == 0:
        full = full / _fullness(traffic, room)
    alone = np.zeros_like(full)
    for (share, tokens), one in zip(traffic.prompts, mixed, strict=False):
        alone = alone + share * (one + np.where(tokens < room, 0.0, tokens / room - 0.5) * full)
    return decode, alone, full


def _fixed(model: StepModel, draft: Drafting | None) -> tuple[float, ...]:
    """pp, dp, request_s, lag_steps, first_token, per_seq, pace."""
    rows, pace = (draft.speculation.rows, draft.speculation.pace) if draft else (1, 1.0)
    first = FIRST[model.profile.serving.first_token]
    return model.shape.pp, model.shape.dp, *waits(model), first, rows, pace


def _seconds(model: StepModel, draft: Drafting | None, *steps: StepLoad) -> list[Array]:
    """Of each step in its own shape; all are priced at once, which takes little longer than one."""
    flat = [step.arrays() for step in steps]
    together = StepLoad(
        *(
            np.concatenate([getattr(one, name) for one in flat])
            for name in ("seqs", "context", "tokens", "chunks", "cached")
        )
    )
    found = model.seconds(together)
    if draft is not None:
        found = found + draft.seconds(together)
    ends = np.cumsum([one.seqs.size for one in flat])[:-1]
    return [part.reshape(one.shape) for part, one in zip(np.split(found, ends), flat, strict=True)]


@dataclass(frozen=True, slots=True)
class Exact:
    """Every call asks the step model. Shapes: seqs [1, K], all else [1, 1]."""

    model: StepModel
    draft: Drafting | None
    traffic: Traffic
    budget: Array
    pp: Array
    dp: Array
    request_s: Array
    lag_steps: Array
    first_token: Array
    per_seq: Array
    pace: Array

    @property
    def places(self) -> tuple[float, ...]:
        return _MANY

    @staticmethod
    def of(model: StepModel, traffic: Traffic, budget: float, draft: Drafting | None = None) -> Exact:
        fixed = (np.array([[float(value)]]) for value in (budget, *_fixed(model, draft)))
        return Exact(model, draft, traffic, *fixed)

    def at(self, seqs: Array) -> tuple[Array, Array, Array]:
        seqs = np.maximum(seqs, 1.0)
        room = np.maximum(self.budget - self.per_seq * seqs, 1.0)
        steps = loads(self.traffic, seqs, room, -_GAUSS)
        if self.traffic.role == "decode" or np.all(self.traffic.new_tokens <= room):
            return folded(self.traffic, _seconds(self.model, self.draft, *steps), room)
        later = loads(self.traffic, seqs, room, _GAUSS)[-1]
        *found, full, last = _seconds(self.model, self.draft, *steps, later)
        return folded(self.traffic, [*found, (full + last) / 2], room)


@dataclass(frozen=True, slots=True)
class Curves:
    """Linear interpolation on GRID for N schedulers. `decode`, `alone`, `full` are [N, len(GRID)].

    Batches beyond the grid extend its last segment.
    """

    decode: Array
    alone: Array
    full: Array
    budget: Array
    pp: Array
    dp: Array
    request_s: Array
    lag_steps: Array
    first_token: Array
    per_seq: Array
    pace: Array

    @property
    def places(self) -> tuple[float, ...]:
        return _FEW

    @staticmethod
    def of(
        model: StepModel, traffic: Traffic, budgets: Sequence[int], draft: Drafting | None = None
    ) -> Curves:
        """One row per token budget of one step model."""
        budget = np.array(budgets, dtype=np.float64)[:, None]
        fixed = _fixed(model, draft)
        room = np.maximum(budget - fixed[_FIXED.index("per_seq") - 1] * GRID[None, :], 1.0)
        found = _seconds(model, draft, *loads(traffic, GRID[None, :], room))
        decode, alone, full = folded(traffic, found, room)
        shape = np.ones_like(room)
        return Curves(
            decode * shape, alone * shape, full * shape, budget, *(np.ones_like(budget) * v for v in fixed)
        )

    @staticmethod
    def stacked(parts: Sequence[Curves]) -> Curves:
        return Curves(*(np.concatenate([getattr(part, name) for part in parts]) for name in _CURVES))

    def rows(self, index: NDArray[np.intp]) -> Curves:
        """Some rows, with repetition."""
        return Curves(*(getattr(self, name)[index] for name in _CURVES))

    def at(self, seqs: Array) -> tuple[Array, Array, Array]:
        seqs = np.maximum(seqs, 1.0)
        left = np.clip(np.searchsorted(GRID, seqs, side="right") - 1, 0, len(GRID) - 2)
        share = (seqs - GRID[left]) / (GRID[left + 1] - GRID[left])
        row = np.arange(len(self.decode))[:, None]
        lower = [table[row, left] for table in (self.decode, self.alone, self.full)]
        upper = [table[row, left + 1] for table in (self.decode, self.alone, self.full)]
        decode, alone, full = (a + (b - a) * share for a, b in zip(lower, upper, strict=True))
        return decode, alone, full
