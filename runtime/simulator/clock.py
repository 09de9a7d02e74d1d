"""Step times as look-ups: what a step model says, tabulated once and asked one step at a time.

A step's kernels fall into three parts that depend on few numbers each, so that four small tables
replace the five-dimensional load of `planc.cost_model.step.StepLoad`:

    decode(b, c)    steps without prompts: b sequences, mean context c; piecewise linear in c
    shared(r)       kernels over all r rows of a mixed step, with logits of one row
    head(s)         what logits of s rows add
    prompt(n, q, p) one chunk's share of the attention of n chunks of q tokens after p cached ones

Tables are filled in blocks when first asked for. Batches and rows are tabulated one by one; contexts and
lengths of chunks have knots, and everything is linear between them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import NamedTuple, Protocol

import numpy as np

from planc.cost_model.features import Array
from planc.cost_model.step import StepLoad, StepModel

#: mean contexts: powers of two and half-way between, where windows and cache effects begin
CONTEXTS: tuple[int, ...] = (1, *(part * 2**k // 2 for k in range(6, 21) for part in (2, 3)))
#: query rows of an attention kernel's blocks: a chunk that needs one more takes a step longer
_TILE = 128
#: chunk lengths: eight to an octave, so that a parabola is off by 0.1 % between them, and both sides of the
#: steps that are higher than that
CHUNKS: tuple[int, ...] = tuple(
    sorted(
        {*range(1, 33), *(round(2 ** (k / 8)) for k in range(41, 161))}
        | {tiles * _TILE + side for tiles in range(1, 17) for side in (0, 1)}
    )
)
#: tokens cached before a chunk
CACHED: tuple[int, ...] = (0, *(part * 2**k // 4 for k in range(5, 21) for part in (4, 5, 6, 7)))
#: chunks that share a step; more of them take their shares as the last number does
TOGETHER: tuple[int, ...] = (*range(1, 9), 10, 12, 16)
#: batches, and lengths of chunks, filled at once
_BLOCK, _LENGTHS = 32, 8
#: prompt tokens beside which logits are priced
_WIDE = 8192


class Line(NamedTuple):
    """Step time near a mean context: `seconds` now, `slope` more per token of it, for `steps` steps."""

    seconds: float
    slope: float
    steps: int


class StepTimes(Protocol):
    """What a replica asks: the seconds of its next step. `Clock` answers from a step model."""

    def line(self, seqs: int, context: float, draft: int = 0) -> Line: ...

    def mixed(
        self, seqs: int, context: float, chunks: Sequence[tuple[int, int]], draft: int = 0
    ) -> tuple[float, float]: ...


class Clock:
    """Scalar step times of one engine: about a microsecond each, within 1 % of the step model's.

    With pipeline parallelism a "step" is a full cycle: the batch goes round in pp micro-batches, and
    prompts ride in as few of them as hold them.

    budget   tokens of a micro-batch; None: one carries all prompts of a cycle
    """

    def __init__(self, model: StepModel, budget: int | None = None) -> None:
        self.model, self.budget = model, budget
        self.stages = model.shape.pp
        self._decode: dict[int, list[float]] = {}
        self._tables = [_StageTables(model, stage) for stage in _unlike_stages(model)]

    def line(self, seqs: int, context: float, draft: int = 0) -> Line:
        """A step of `seqs` decoding sequences at a mean context (the new token included), and how its
        time grows while every sequence grows by one token a step.

        draft   tokens of each that are verified besides the new one: more rows, the same cache read
        """
        if draft:
            plain = self.line(seqs, context)
            more = max(part.verified(seqs, draft) for part in self._tables)
            return Line(plain.seconds + self.stages * more, plain.slope, plain.steps)
        if self.stages == 1:
            return _line(self._decode.get(seqs) or self._fill(seqs), context)
        small, many = divmod(seqs, self.stages)
        if small == 0:
            one = _line(self._decode.get(1) or self._fill(1), context)
            return Line(one.seconds * self.stages, one.slope * self.stages, one.steps)
        low = _line(self._decode.get(small) or self._fill(small), context)
        high = _line(self._decode.get(small + 1) or self._fill(small + 1), context) if many else low
        few = self.stages - many
        return Line(few * low.seconds + many * high.seconds, few * low.slope + many * high.slope, low.steps)

    def mixed(
        self, seqs: int, context: float, chunks: Sequence[tuple[int, int]], draft: int = 0
    ) -> tuple[float, float]:
        """(seconds, drain) of a step with decoding sequences and prompt chunks (new tokens, cached ones).

        drain: by how much the chunks' own results come later than the step's end: pipeline stages that
        the next cycle does not wait for.
        """
        if self.stages == 1:
            return self._tables[0].mixed(seqs, context, chunks, draft), 0.0
        riding = max(seqs // self.stages, 1) if seqs else 0
        room = max(self.budget - riding * (1 + draft), 1) if self.budget else sum(new for new, _ in chunks)
        full = [
            max(part.mixed(riding, context, load, draft) for part in self._tables)
            for load in _loaded(chunks, room)
        ]
        plain = self.line(riding * self.stages, context, draft).seconds / self.stages if riding else 0.0
        others = max(self.stages - len(full), 0) * plain
        return sum(full) + others, (self.stages - 1) * full[-1] - others

    def _fill(self, seqs: int) -> list[float]:
        low = (seqs - 1) // _BLOCK * _BLOCK + 1
        batch = np.arange(low, low + _BLOCK, dtype=np.float64)[:, None]
        found = self.model.seconds(StepLoad(batch, np.array(CONTEXTS, dtype=np.float64)))
        for offset, row in enumerate(found.tolist()):
            self._decode[low + offset] = row
        return self._decode[seqs]


def _unlike_stages(model: StepModel) -> list[int]:
    """One stage of each kind: most stages of a pipeline hold the same layers."""
    probe = StepLoad(np.array([0.0, 9.0]), 1000, np.array([999.0, 0.0]), np.array([1.0, 0.0]))
    found: dict[bytes, int] = {}
    for stage, values in enumerate(np.concatenate(astuple(model.pieces(probe)), axis=1)):
        found.setdefault(values.tobytes(), stage)
    return list(found.values())


def _loaded(chunks: Sequence[tuple[int, int]], room: int) -> list[list[tuple[int, int]]]:
    """Chunks (new tokens, cached ones) cut into micro-batches of up to `room` tokens, in order."""
    found: list[list[tuple[int, int]]] = [[]]
    left = room
    for new, cached in chunks:
        while new:
            if not left:
                found.append([])
                left = room
            part = min(new, left)
            found[-1].append((part, cached))
            new, cached, left = new - part, cached + part, left - part
    return found


class _StageTables:
    """The parts of one pipeline stage's mixed steps."""

    def __init__(self, model: StepModel, stage: int) -> None:
        self.model, self.stage = model, stage
        self.factor, self.beside = model.profile.prefill_factor, model.layers.mixed_decode - 1.0
        probe = StepLoad(np.array([0.0, 0.0, 0.0, 1.0]), 1, np.array([1, 1001, 1001, 1000]), [1, 1, 2, 1])
        self.piecewise = model.profile.cuda_graphs.piecewise
        few, many = self._ask(StepLoad(0, 0, np.array([1.0, self.piecewise + 1.0]), 1), "launches")
        self.launches, self.launches_between_graphs = float(many), float(few)
        host, longer, split, seated = (float(x) for x in self._ask(probe, "host"))
        _, once, twice, _ = (float(x) for x in self._ask(probe, "launches"))
        self.hidden = twice - once
        self.per_row, self.per_chunk, self.per_seq = (longer - host) / 1000, split - longer, seated - longer
        self.fixed = host - self.per_row - self.per_chunk
        self.shared = Curve(lambda rows: self._ask(StepLoad(0, 0, rows, 1), "shared"))
        self.head = Curve(self._logits)
        self._alone: dict[int, list[float]] = {}
        self._prompt: dict[tuple[int, int], list[float]] = {}

    def mixed(self, seqs: int, context: float, chunks: Sequence[tuple[int, int]], draft: int) -> float:
        count, tokens, attention = len(chunks), 0, 0.0
        for new, cached in chunks:
            tokens += new
            attention += self._chunk(new, cached, count)
        verified = seqs * (1 + draft)
        rows = verified + tokens
        device = self.shared(rows) + self.head(verified + count) + attention
        alone = decode = 0.0
        if seqs:
            row = self._alone.get(seqs) or self._fill_alone(seqs)
            decode = _line(row, context).seconds
            device += decode
            alone = (self._alone.get(verified) or self._fill_alone(verified))[-1] + decode
        device += (self.factor - 1.0) * max(device - alone, 0.0) + self.beside * decode
        host = self.fixed + self.per_row * rows + self.per_chunk * count + self.per_seq * seqs
        launches = self.launches_between_graphs if rows <= self.piecewise else self.launches
        return max(device, launches + self.hidden * (seqs + count - 1)) + host

    def verified(self, seqs: int, draft: int) -> float:
        """What verifying so many drafted tokens of each sequence adds to a step without prompts."""
        rows = seqs * (1 + draft)
        one, all_ = (self._alone.get(n) or self._fill_alone(n) for n in (seqs, rows))
        return max(all_[-1] - one[-1], 0.0)

    def _ask(self, load: StepLoad, piece: str) -> Array:
        found: Array = getattr(self.model.pieces(load), piece)[self.stage]
        return found

    def _logits(self, rows: Array) -> Array:
        """What the logits of so many rows add to those of one."""
        many, one = StepLoad(0, 0, _WIDE, rows), StepLoad(0, 0, _WIDE, np.ones_like(rows))
        return self._ask(many, "shared") - self._ask(one, "shared")

    def _fill_alone(self, seqs: int) -> list[float]:
        """Per batch: decode attention at every context, and last the shared kernels of a step without
        prompts."""
        low = (seqs - 1) // _BLOCK * _BLOCK + 1
        batch = np.arange(low, low + _BLOCK, dtype=np.float64)[:, None]
        pieces = self.model.pieces(StepLoad(batch, np.array(CONTEXTS, dtype=np.float64)))
        attention, shared = (part[self.stage].reshape(_BLOCK, -1) for part in (pieces.decode, pieces.shared))
        for offset, (row, rest) in enumerate(zip(attention.tolist(), shared[:, 0].tolist(), strict=True)):
            self._alone[low + offset] = [*row, rest]
        return self._alone[seqs]

    def _chunk(self, new: int, cached: int, count: int) -> float:
        """One chunk's share of the attention of `count` such chunks: linear in 1 / count between the
        tabulated ones, as a floor under each kernel would have it."""
        at = bisect_right(TOGETHER, count) - 1
        few = TOGETHER[at]
        share = self._share(new, cached, few)
        if few < count < TOGETHER[-1]:
            many = TOGETHER[at + 1]
            part = (1 / few - 1 / count) / (1 / few - 1 / many)
            share += part * (self._share(new, cached, many) - share)
        return share

    def _share(self, new: int, cached: int, count: int) -> float:
        left = bisect_right(CHUNKS, new) - 1
        low = _at(self._prompt.get((count, left)) or self._fill_prompt(count, left), cached)
        if CHUNKS[left] == new or left + 1 == len(CHUNKS):
            return low
        high = _at(self._prompt.get((count, left + 1)) or self._fill_prompt(count, left + 1), cached)
        return low + (new - CHUNKS[left]) / (CHUNKS[left + 1] - CHUNKS[left]) * (high - low)

    def _fill_prompt(self, count: int, index: int) -> list[float]:
        low = index // _LENGTHS * _LENGTHS
        tokens = count * np.array(CHUNKS[low : low + _LENGTHS], dtype=np.float64)[:, None]
        load = StepLoad(0, 0, tokens, count, np.array(CACHED, dtype=np.float64))
        found = (self._ask(load, "prefill") / count).reshape(len(tokens), -1)
        for offset, row in enumerate(found.tolist()):
            self._prompt[count, low + offset] = row
        return self._prompt[count, index]


class Curve:
    """A function of a number of rows, asked for 512 rows at a time. Exact: tiles, graphs and message sizes
    make it jump anywhere."""

    def __init__(self, ask: Callable[[Array], Array]) -> None:
        self._ask = ask
        self._known: dict[int, float] = {}

    def __call__(self, rows: int) -> float:
        found = self._known.get(rows)
        return self._fill(rows) if found is None else found

    def _fill(self, rows: int) -> float:
        low = max(rows - 1, 0) // 512 * 512
        wanted = range(low + 1, low + 513)
        seconds: list[float] = self._ask(np.array(wanted, dtype=np.float64)).tolist()
        self._known.update(zip(wanted, seconds, strict=True))
        return self._known[rows]


def _line(row: list[float], context: float) -> Line:
    """Reads a row over CONTEXTS; contexts off the grid extend its ends."""
    left = min(max(bisect_right(CONTEXTS, context) - 1, 0), len(CONTEXTS) - 2)
    start, stop = CONTEXTS[left], CONTEXTS[left + 1]
    slope = (row[left + 1] - row[left]) / (stop - start)
    steps = int(stop - context) + 1 if stop > context else 1 << 30
    return Line(row[left] + slope * (context - start), slope, steps)


def _at(row: list[float], cached: int) -> float:
    """Reads a row over CACHED."""
    left = min(bisect_right(CACHED, cached) - 1, len(CACHED) - 2)
    return row[left] + (cached - CACHED[left]) / (CACHED[left + 1] - CACHED[left]) * (
        row[left + 1] - row[left]
    )
