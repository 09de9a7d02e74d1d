"""Step times for the steady state: exact from one step model, or interpolated for many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planc.cost_model.speculative import Drafting
from planc.cost_model.step import StepLoad, StepModel
from planc.planner.priors import waits
from planc.planner.steady_state import FIRST, Array
from planc.planner.traffic import Traffic

#: decoding sequences per step at which curves are tabulated; n and n + 1 where kernels change their tiles
_STARTS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 20, 24, 25, 32, 33, 40, 48, 56, 64, 65, 72, 80, 96, 97, 112)
_LARGE = (128, 129, 144, 160, 176, 192, 193, 208, 224, 240, 256, 257, 288, 320, 384, 385, 448, 512, 513)
_FIXED = ("budget", "pp", "dp", "request_s", "lag_steps", "first_token", "per_seq", "pace")
_CURVES = ("decode", "mixed", "full", *_FIXED)
GRID = np.array((*_STARTS, *_LARGE, 640, 768, 769, 896, 1024), dtype=np.float64)


def loads(traffic: Traffic, seqs: Array, budget: Array, rows: int = 1) -> tuple[StepLoad, StepLoad, StepLoad]:
    """The steps D, M and F of `planner.steady_state` at `seqs` decoding sequences, each of so many `rows`,
    and a token budget."""
    context = traffic.decode_context
    if traffic.role == "decode":
        return (StepLoad(seqs, context),) * 3
    if traffic.decode_steps == 0:
        seqs = np.zeros_like(seqs)
    room = np.maximum(budget - rows * seqs, 1.0)
    chunk = np.minimum(traffic.new_tokens, room)
    cached = np.maximum(traffic.prefill_context - chunk / 2, 0.0)
    return (
        StepLoad(seqs, context),
        StepLoad(seqs, context, chunk, 1.0, cached),
        StepLoad(seqs, context, room, np.maximum(room / traffic.new_tokens, 1.0), cached),
    )


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

    @staticmethod
    def of(model: StepModel, traffic: Traffic, budget: float, draft: Drafting | None = None) -> Exact:
        fixed = (np.array([[float(value)]]) for value in (budget, *_fixed(model, draft)))
        return Exact(model, draft, traffic, *fixed)

    def at(self, seqs: Array) -> tuple[Array, Array, Array]:
        rows = self.draft.speculation.rows if self.draft else 1
        plain, mixed, full = loads(self.traffic, np.maximum(seqs, 1.0), self.budget, rows)
        if mixed is plain:
            (decode,) = _seconds(self.model, self.draft, plain)
            return decode, decode, decode
        decode, one, many = _seconds(self.model, self.draft, plain, mixed, full)
        return decode, one, many


@dataclass(frozen=True, slots=True)
class Curves:
    """Linear interpolation on GRID for N schedulers. `decode`, `mixed`, `full` are [N, len(GRID)].

    Batches beyond the grid extend its last segment.
    """

    decode: Array
    mixed: Array
    full: Array
    budget: Array
    pp: Array
    dp: Array
    request_s: Array
    lag_steps: Array
    first_token: Array
    per_seq: Array
    pace: Array

    @staticmethod
    def of(
        model: StepModel, traffic: Traffic, budgets: Sequence[int], draft: Drafting | None = None
    ) -> Curves:
        """One row per token budget of one step model."""
        budget = np.array(budgets, dtype=np.float64)[:, None]
        plain, mixed, full = loads(traffic, GRID[None, :], budget, draft.speculation.rows if draft else 1)
        ones = np.ones_like(budget)
        steps = (plain,) if mixed is plain else (plain, mixed, full)
        found = _seconds(model, draft, *steps)
        decode = np.repeat(found[0], len(budgets), axis=0)
        one, many = found[1:] or (decode, decode)
        return Curves(
            decode,
            one,
            many,
            budget,
            *(ones * value for value in _fixed(model, draft)),
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
        lower = [table[row, left] for table in (self.decode, self.mixed, self.full)]
        upper = [table[row, left + 1] for table in (self.decode, self.mixed, self.full)]
        plain, mixed, full = (a + (b - a) * share for a, b in zip(lower, upper, strict=True))
        return plain, mixed, full
