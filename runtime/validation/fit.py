"""The constants of serving, fitted to measured points: few, shrunk, and blind where it matters.

Measured TPOT and TTFT are compared with predictions that are linear in the constants around the shipped
ones, t(x) = t0 + D x, with t0 simulated and D in closed form; the fit minimises

    sum over rows  w rho(ln t(x) - ln measured)  +  sum over constants (x / spread)^2

with rho = ln(1 + (./scale)^2) / 2 (Cauchy's: outliers pull less the farther they are), and w such that
every cell weighs the same however many rows it has. x has one part for all engines and one for each engine,
the latter with narrower spreads: an engine's own constants are shrunk to the common ones, and those to
neutral ones. What is left out of a fit is a whole cell (model, GPU, engine, weights).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.features import Array
from planc.runtime.validation.constants import NAMES, Constants
from planc.runtime.validation.lint import mean_lengths
from planc.runtime.validation.predict import Predictor, Times, request_ms
from planc.runtime.validation.setups import Setup

Cell = tuple[str, str, str, str]

#: what fits start from and are shrunk to: kernels as measured, and assumptions that no point has touched (the
#: shipped constants have seen all of them, so that a left-out cell would shine through)
NEUTRAL = Constants(
    step_us=50.0,
    layer_us=0.0,
    per_sequence_us=10.0,
    kernel_factor=1.0,
    prefill_factor=1.0,
    request_ms=25.0,
    lag_steps=0.0,
)
#: how far a constant may be expected to lie from that
SPREAD: Mapping[str, float] = {
    "step_us": 60.0,
    "layer_us": 6.0,
    "per_sequence_us": 12.0,
    "kernel_factor": 0.03,
    "prefill_factor": 0.10,
    "request_ms": 40.0,
    "lag_steps": 0.5,
}
#: spreads of an engine's own part, and of one deployment's, over those of the common part; steps
#: of lag are common
_ENGINE, _CELL = 0.6, 2.0
_COMMON = ("lag_steps",)
#: errors in ln t beyond which a row pulls ever less: TPOT, TTFT
_SCALE = (0.10, 0.25)
#: rows of noise that the prior is worth
_NOISE = 8.0
_ITERATIONS = 30


@dataclass(frozen=True, slots=True)
class Linear:
    """Predicted times of N setups as functions of the constants.

    base       [N, 2] TPOT and TTFT, ms, with the shipped constants
    slopes     [N, 2, P] what one unit of each constant adds
    measured   [N, 2], nan where there is none; nan too for the TTFT of pools, which is their prompts' queue
               and not linear in any constant
    """

    setups: tuple[Setup, ...]
    base: Array
    slopes: Array
    measured: Array

    def times(self, change: Array) -> Array:
        """[N, 2] for changes [P] or [N, P] of the constants, at least a fifth of the base."""
        each = np.broadcast_to(change, (len(self.setups), len(NAMES)))
        moved: Array = self.base + np.einsum("nmp,np->nm", self.slopes, each)
        return np.maximum(moved, 0.2 * self.base)

    def rows(self, keep: NDArray[np.bool_]) -> Linear:
        chosen = tuple(s for s, k in zip(self.setups, keep, strict=True) if k)
        return Linear(chosen, self.base[keep], self.slopes[keep], self.measured[keep])


def linearised(
    setups: Sequence[Setup], predictor: Predictor, progress: Callable[[str], None] | None = None
) -> Linear:
    """Simulates every setup once, with the shipped constants."""
    base, slopes = [], []
    for i, setup in enumerate(setups):
        if progress and i % 20 == 0:
            progress(f"simulating {i} of {len(setups)}")
        constants = Constants.shipped(setup.profile)
        times = predictor.times(setup, constants)
        base.append((times.tpot, times.ttft))
        slopes.append(_slopes(predictor, setup, constants, times))
    ttft = [None if s.prefill else s.point.ttft_ms for s in setups]
    measured = np.array(
        [(s.point.tpot_ms or np.nan, t or np.nan) for s, t in zip(setups, ttft, strict=True)],
        dtype=np.float64,
    )
    return Linear(tuple(setups), np.array(base), np.array(slopes), measured)


def _slopes(predictor: Predictor, setup: Setup, constants: Constants, times: Times) -> Array:
    """[2, P] what one unit of each constant adds to TPOT and TTFT, ms.

    A token takes a step of `batch` sequences and, in a mixed engine, the share of prompts that others'
    requests add. TTFT without its constant parts is time that steps with a prompt take, however many.
    """
    prompt, answer = mean_lengths(setup)
    shape, ms = setup.decode.shape, 1e-3
    decoding = max(answer - 1, 1.0) * times.tpot
    ranks = setup.decode.workers * shape.dp
    batch = max(setup.point.concurrency / ranks * decoding / (decoding + times.ttft), 1.0)
    clock = predictor.clock(setup, setup.decode, constants)
    context = prompt + answer / 2
    plain = clock.line(max(round(batch), 1), context).seconds * 1e3
    alone = setup.prefill is not None
    reader = setup.prefill or setup.decode
    riding = 0 if alone else max(round(batch), 1)
    chunk = int(min(prompt, reader.budget - riding))
    mixed = predictor.clock(setup, reader, constants).mixed(riding, context, [(max(chunk, 1), 0)])[0] * 1e3
    layers = sum(cls.count for cls in setup.table.classes if cls.layers) / shape.pp
    host = constants.step_us + constants.layer_us * layers + constants.per_sequence_us * batch
    prompts = 0.0 if alone else max(times.tpot - plain, 0.0)
    tpot = {
        "step_us": ms,
        "layer_us": ms * layers,
        "per_sequence_us": ms * batch,
        "kernel_factor": (times.tpot - ms * host) / constants.kernel_factor,
        "prefill_factor": prompts / constants.prefill_factor,
        "request_ms": 0.0,
        "lag_steps": 0.0,
    }
    request = request_ms(setup, constants)
    rest = max(times.ttft - request - constants.lag_steps * plain, 0.0)
    steps = rest / max(mixed, plain)
    share = 1.0 if alone else max(mixed - plain, 0.0) / max(mixed, 1e-9)
    ttft = {
        "step_us": ms * (steps + constants.lag_steps),
        "layer_us": ms * layers * (steps + constants.lag_steps),
        "per_sequence_us": ms * riding * (steps + constants.lag_steps),
        "kernel_factor": (rest + constants.lag_steps * plain) / constants.kernel_factor,
        "prefill_factor": rest * share / constants.prefill_factor,
        "request_ms": 0.0 if setup.harness.keeps_connections else 1.0,
        "lag_steps": plain,
    }
    return np.array([[of[name] for name in NAMES] for of in (tpot, ttft)])


# -- fits ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fitted:
    """Changes of `NEUTRAL`: common to all engines, and each engine's own part on top."""

    common: Array
    own: Mapping[str, Array]

    def change(self, profile: EngineProfile) -> Array:
        """What to add to the engine's shipped constants."""
        own = self.own.get(profile.name, np.zeros(len(NAMES)))
        found: Array = _start(profile) + self.common + own
        return found

    def constants(self, setup: Setup) -> Constants:
        return Constants.shipped(setup.profile).moved(self.change(setup.profile))


def _start(profile: EngineProfile) -> Array:
    """From the shipped constants to the neutral ones."""
    found: Array = NEUTRAL.vector() - Constants.shipped(profile).vector()
    return found


def fit(linear: Linear) -> Fitted:
    """The constants of all rows of a linear model."""
    engines = sorted({s.profile.name for s in linear.setups})
    size = len(NAMES)
    counts = Counter(s.point.cell for s in linear.setups)
    weights = np.array([np.sqrt(1.0 / counts[s.point.cell]) for s in linear.setups])
    weights = weights * len(linear.setups) / max(weights.sum(), 1e-9)
    spread = np.array([SPREAD[name] for name in NAMES])
    own = spread * np.array([1e-6 if name in _COMMON else _ENGINE for name in NAMES])
    spreads = np.concatenate([spread, *(own for _ in engines)])
    design = np.zeros((len(linear.setups), 2, size * (1 + len(engines))))
    for row, setup in enumerate(linear.setups):
        start = size * (1 + engines.index(setup.profile.name))
        design[row, :, :size] = linear.slopes[row]
        design[row, :, start : start + size] = linear.slopes[row]
    base = linear.times(np.array([_start(s.profile) for s in linear.setups]))
    found = _solve(base, design, linear.measured, weights, spreads, np.zeros(spreads.size))
    parts = found.reshape(1 + len(engines), size)
    return Fitted(parts[0], dict(zip(engines, parts[1:], strict=True)))


def left_out(linear: Linear, cells: Iterable[Cell] | None = None) -> dict[Cell, Fitted]:
    """For each cell, the constants fitted to all others."""
    names = {s.point.cell for s in linear.setups} if cells is None else set(cells)
    found = {}
    for cell in sorted(names):
        keep = np.array([s.point.cell != cell for s in linear.setups])
        if keep.any():
            found[cell] = fit(linear.rows(keep))
    return found


def calibrated(linear: Linear, prior: Array) -> Array:
    """Changes of the shipped constants for one deployment, from a few of its own rows: shrunk to `prior`
    (its engine's change) with the spreads of single deployments."""
    spread = np.array([SPREAD[name] for name in NAMES]) * _CELL
    weights = np.full(len(linear.setups), _NOISE)
    return _solve(linear.base, linear.slopes, linear.measured, weights, spread, prior)


def _solve(base: Array, design: Array, measured: Array, weights: Array, spread: Array, prior: Array) -> Array:
    """Gauss-Newton with Cauchy's weights (iteratively reweighted least squares)."""
    change = prior.copy()
    known = np.isfinite(measured)
    scale = np.array(_SCALE)
    for _ in range(_ITERATIONS):
        times = np.maximum(base + np.einsum("nmp,p->nm", design, change), 0.2 * base)
        error = np.where(known, np.log(times) - np.log(np.where(known, measured, 1.0)), 0.0) / scale
        pull = weights[:, None] * known / (1.0 + error**2) / _NOISE
        slope = design / times[:, :, None] / scale[None, :, None]
        normal = np.einsum("nmp,nm,nmq->pq", slope, pull, slope) + np.diag(1.0 / spread**2)
        right = np.einsum("nmp,nm,nm->p", slope, pull, error) + (change - prior) / spread**2
        step = np.linalg.solve(normal, right)
        change = change - step
        if float(np.max(np.abs(step) / spread)) < 1e-4:
            break
    return change


# -- three points ----------------------------------------------------------------------


def chosen_points(linear: Linear, rows: Sequence[int]) -> list[int]:
    """Three rows of a cell to calibrate on: the lightest load of the shortest prompts, the heaviest load of
    the shortest prompts, and, of the longest prompts for their answers, the middle load. No measured value
    decides."""
    label = lambda i: linear.setups[i].point  # noqa: E731
    shortest = min(label(i).isl for i in rows)
    short = [i for i in rows if label(i).isl == shortest]
    key = lambda i: (label(i).concurrency / label(i).gpus, label(i).concurrency, label(i).row)  # noqa: E731
    low, high = min(short, key=key), max(short, key=key)
    heavy = max(label(i).isl / label(i).osl for i in rows)
    long = sorted((i for i in rows if label(i).isl / label(i).osl == heavy), key=key)
    middle = long[len(long) // 2]
    return list(dict.fromkeys((low, high, middle)))
