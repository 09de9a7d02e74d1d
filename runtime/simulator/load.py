"""What clients send: closed loops and recorded or drawn arrivals, with lengths from distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planc.errors import InvalidField
from planc.planner.traffic import Traffic

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
#: draws so many lengths
Lengths = Callable[[np.random.Generator, int], Ints]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests, by id.

    arrival_s     when a client sends it; None for a closed loop, where a client sends its next request
                  when it has the answer to its last
    prompt, output  token counts, arrays or distributions
    concurrency   clients of a closed loop             ramp_s  over which they start; 0: all at once
    warm_up       requests that the clients of a closed loop send first: when all of these are answered they
                  start again together
    priority, adapter   one integer per request (lower priorities run first; adapter -1 is the base model)
    prefix        per request, hashes of the leading blocks of its prompt; `prefix_block` tokens each
    """

    requests: int
    prompt: Ints | Lengths
    output: Ints | Lengths
    arrival_s: Floats | None = None
    concurrency: int | None = None
    ramp_s: float = 0.0
    warm_up: int = 0
    priority: Ints | None = None
    adapter: Ints | None = None
    prefix: Sequence[Sequence[int]] | None = None
    prefix_block: int = 0

    def lengths(self, seed: int) -> tuple[Ints, Ints]:
        """(prompt, output) tokens of every request, at least one each."""
        streams = np.random.default_rng(seed).spawn(2)
        drawn = [
            tokens(stream, self.requests) if callable(tokens) else tokens
            for tokens, stream in zip((self.prompt, self.output), streams, strict=True)
        ]
        return np.maximum(drawn[0], 1), np.maximum(drawn[1], 1)


def closed_loop(
    concurrency: int,
    requests: int,
    prompt: ArrayLike | Lengths,
    output: ArrayLike | Lengths,
    *,
    burst: bool = True,
    ramp_s: float = 0.0,
) -> Load:
    """`concurrency` clients that send `requests` in all, each its next one when the last is answered.

    burst   all clients start at once; otherwise evenly over `ramp_s`
    """
    for name, value in (("concurrency", concurrency), ("requests", requests)):
        if value < 1:
            raise _bad(name, value, "must be at least 1", "Raise it.")
    if not burst and ramp_s <= 0:
        raise _bad("ramp_s", ramp_s, "clients that do not start at once need time", "Give seconds above 0.")
    return Load(
        requests,
        _lengths(prompt, requests, "prompt"),
        _lengths(output, requests, "output"),
        concurrency=min(concurrency, requests),
        ramp_s=0.0 if burst else ramp_s,
    )


def open_loop(
    arrival_s: ArrayLike,
    prompt: ArrayLike | Lengths,
    output: ArrayLike | Lengths,
    *,
    priority: ArrayLike | None = None,
    adapter: ArrayLike | None = None,
    prefix: Sequence[Sequence[int]] | None = None,
    prefix_block: int = 0,
) -> Load:
    """Requests that arrive at given seconds, ascending, whatever the server does."""
    times = np.asarray(arrival_s, dtype=np.float64)
    if times.ndim != 1 or not times.size:
        raise _bad("arrival_s", times.shape, "is no list of times", "Give at least one arrival.")
    if not np.all(np.isfinite(times)) or times[0] < 0 or np.any(np.diff(times) < 0):
        raise _bad("arrival_s", float(times.min()), "times must ascend from 0 on", "Sort the arrivals.")
    count = times.size
    if prefix is not None and (len(prefix) != count or prefix_block < 1):
        raise _bad("prefix", len(prefix), f"{count} lists of hashes and a prefix_block are needed", "Add it.")
    load = Load(count, _lengths(prompt, count, "prompt"), _lengths(output, count, "output"), arrival_s=times)
    column = lambda name, values: None if values is None else _column(values, count, name)  # noqa: E731
    return replace(
        load,
        priority=column("priority", priority),
        adapter=column("adapter", adapter),
        prefix=prefix,
        prefix_block=prefix_block,
    )


def lengths(flow: Traffic, count: int, low: float, high: float, seed: int) -> tuple[Ints, Ints, Ints]:
    """(sample point, prompt, answer) of `count` requests of a workload: prompts and answers drawn as pairs,
    each then stretched by a factor of its own, evenly between `low` and `high`."""
    draw = np.random.default_rng(seed)
    which = draw.choice(flow.weight.size, count, p=flow.weight)
    factors = draw.uniform(low, high, (2, count))
    prompt, output = (
        np.maximum(np.rint(tokens[which] * factor), 1).astype(np.int64)
        for tokens, factor in zip((flow.isl, flow.osl), factors, strict=True)
    )
    return which, prompt, output


def shared_prefix(prompt: Ints, hit_rate: float, block: int) -> dict[str, Any]:
    """Fields of a `Load` whose requests all share one prefix, so long that the stated share of prompt tokens
    is found; {} where none is."""
    if not hit_rate:
        return {}
    return {
        "prefix": [tuple(range(int(tokens * hit_rate) // block)) for tokens in prompt.tolist()],
        "prefix_block": block,
    }


# -- arrivals ----------------------------------------------------------------------------


def poisson(rate: float, requests: int, seed: int = 0) -> Floats:
    """Arrival times of a Poisson process, `rate` per second."""
    return gamma(rate, requests, 1.0, seed)


def gamma(rate: float, requests: int, cv: float, seed: int = 0) -> Floats:
    """Arrival times with Gamma distributed gaps of mean 1 / rate and coefficient of variation `cv`."""
    if not rate > 0 or cv < 0:
        name, value = ("rate", rate) if not rate > 0 else ("cv", cv)
        raise _bad(name, value, "must be positive", "Give requests per second, and a cv of 0 or more.")
    if cv == 0:
        return np.asarray(np.arange(requests) / rate)
    draw = np.random.default_rng([seed, 1])
    gaps = draw.gamma(1 / cv**2, cv**2 / rate, requests)
    return np.asarray(np.cumsum(gaps), dtype=np.float64)


# -- lengths -----------------------------------------------------------------------------


def fixed(tokens: int) -> Lengths:
    return lambda draw, count: np.full(count, tokens, dtype=np.int64)


def uniform(low: int, high: int) -> Lengths:
    """Every length from `low` to `high` equally likely, both ends included."""
    if not 1 <= low <= high:
        raise _bad("low", low, f"lengths must rise from 1 on, to {high}", "Swap or raise them.")
    return lambda draw, count: draw.integers(low, high, count, dtype=np.int64, endpoint=True)


def lognormal(mean: float, cv: float, longest: int = 1 << 20) -> Lengths:
    """Log-normal lengths of a mean and a coefficient of variation, cut at `longest`."""
    spread = np.log(1 + cv**2)

    def draw_lengths(draw: np.random.Generator, count: int) -> Ints:
        found = draw.lognormal(np.log(mean) - spread / 2, np.sqrt(spread), count)
        return np.clip(np.rint(found), 1, longest).astype(np.int64)

    return draw_lengths


def empirical(values: ArrayLike) -> Lengths:
    """Lengths drawn with replacement from those seen."""
    seen = np.asarray(values, dtype=np.int64)
    return lambda draw, count: draw.choice(seen, count)


def _lengths(value: ArrayLike | Lengths, count: int, name: str) -> Ints | Lengths:
    if callable(value):
        return value
    found = _column(value if np.ndim(value) else np.full(count, value), count, name)
    if found.min() < 1:
        raise _bad(name, int(found.min()), "a request has at least one token", "Drop such requests.")
    return found


def _column(values: ArrayLike, count: int, name: str) -> Ints:
    found = np.asarray(values, dtype=np.int64)
    if found.shape != (count,):
        raise _bad(name, found.shape, f"there are {count} requests", "Give one number for each.")
    return found


def _bad(name: str, value: object, reason: str, mend: str) -> InvalidField:
    return InvalidField(where="load", field=name, value=value, reason=reason, mend=mend)
