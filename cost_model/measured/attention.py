"""Attention from measured tables of the engines' kernels, looked up by work that kernels see alike.

A table's residual depends on how much runs side by side and how long each loop over keys is:

    decode   (heads, reach, group)   heads: sequences x KV heads; reach: keys that a token sees
    prefill  (heads, reach, group)   heads: prompts x query heads; reach: length of a causal prompt

with group = query heads per KV head. A chunk of q tokens after p cached ones is looked up as the causal
prompt that has as many query tiles and as long loops: x = q + 2p tokens and heads * q / x heads, which
attends to as many (query, key) pairs. It takes no less than one block's loop over all p + q keys, as in a
lone head's prompt of p + q tokens. A sliding window that was measured has a table of its own; any
other span is priced as full attention to the keys it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.features import Array, window_sum
from planc.cost_model.kernels import COMPUTE, MEMORY, Attention, AttentionLoad, Priced, Times
from planc.cost_model.measured import attention_latent, attention_linear
from planc.cost_model.measured.attention_tables import (
    SHORTEST,
    TILE,
    Append,
    Causal,
    Ideal,
    Loads,
    One,
    Seconds,
    Surface,
    founded,
    keys_of,
    nearest,
    pairs_of,
    sliced,
)
from planc.cost_model.memory import MIB
from planc.cost_model.profile import Profile, Table, shipped
from planc.cost_model.roofline import Roofline

_BLOCK = 128.0  # query rows of a block
_EVERYTHING = 1e9  # tokens: no window
_STREAMED = 0.88  # share of memory peak at which decode reads keys and values (`attention_decode_memory`)
_SWEPT = 2.0  # cache sizes that a kernel must read before none of it stays for the next call


def prepare(
    specs: Sequence[Attention], gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Priced[AttentionLoad, Times]:
    """Kernels that no table covers cost what the roofline says."""
    profile = shipped("attention", gpu.name)
    found = [None if profile is None else _priced(spec, profile, gpu, engine, roofline) for spec in specs]
    rest = [i for i, one in enumerate(found) if one is None]
    physics = roofline.attention([specs[i] for i in rest]) if rest else None
    bounds = [COMPUTE if spec.part == "prefill" else MEMORY for spec in specs]

    def price(load: AttentionLoad) -> Times:
        seconds = np.zeros_like(load.flops)
        bound: npt.NDArray[np.int8] = np.broadcast_to(np.array(bounds)[:, None], seconds.shape).astype(
            np.int8
        )
        if physics is not None:
            times = physics(_only(load, rest))
            seconds[rest], bound[rest] = times.seconds, times.bound
        for row, one in enumerate(found):
            if one is not None:
                seconds[row] = one.seconds(_row(load, row))
        return Times(np.where(load.tokens > 0, seconds, 0.0), bound)

    return Priced(price, tuple(roofline.source if one is None else one.source for one in found))


def _only(load: AttentionLoad, rows: Sequence[int]) -> AttentionLoad:
    part = list(rows)
    return AttentionLoad(
        load.flops[part], load.kv[part], load.acts[part], load.tokens, load.sequences, load.context
    )


def _row(load: AttentionLoad, row: int) -> Loads:
    tokens, sequences = np.maximum(load.tokens, 1.0), np.maximum(load.sequences, 1.0)
    return Loads(load.flops[row], load.kv[row], tokens, sequences, load.context)


def _priced(
    spec: Attention, profile: Profile, gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> One | None:
    if spec.kind == "recurrence":
        return attention_linear.priced(spec, profile, engine.name)
    if spec.kind != "attention" or not (spec.kv_heads and spec.pair_flops and spec.key_width):
        return None
    if spec.latent:
        return attention_latent.priced(spec, profile, gpu, engine, roofline)
    return _softmax(spec, profile, engine.name, float(gpu.sm_count), gpu.l2_mib * MIB)


@lru_cache(maxsize=512)
def _softmax(spec: Attention, profile: Profile, engine: str, sms: float, l2: float) -> One | None:
    """Multi-head or grouped-query attention from the table that fits it best."""
    window = float(spec.span[1:]) if spec.span[:1] == "w" else 0.0

    def head(table: Table) -> float:
        return float(abs(np.log(float(table.info.key["head_dim"]) / spec.qk_dim)))

    def distance(table: Table) -> tuple[float, ...]:
        theirs = float(table.info.key["window"])
        near = window and theirs and 0.5 <= theirs / window <= 2.0
        unlike = (
            0.0 if theirs == window else abs(np.log(theirs / window)) if near else np.inf if theirs else 1.0
        )
        return head(table), unlike, abs(float(table.info.key["kv_bytes"]) - spec.kv_bytes)

    table = nearest(profile, engine, distance, op="softmax", part=spec.part)
    if table is None:
        return None
    seconds = _decode(spec, table, l2) if spec.part == "decode" else _prefill(spec, table, sms)
    return One(seconds, founded(table, engine, head(table)))


def _decode(spec: Attention, table: Table, l2: float) -> Seconds:
    """A benchmark that repeats itself finds keys and values in a cache that holds them; in a step, the other
    layers have swept them out. So no reach is better used than one that is too long for the cache, but none
    takes more than the kernel's floor and its bytes from memory."""
    grid, ideal, window = sliced(table, spec.q_heads / spec.kv_heads), Ideal.of(table), _window(table)
    per_key, new = spec.key_width / spec.kv_heads * spec.kv_bytes, _new_bytes(spec)

    def seconds(heads: Array, reach: Array) -> Array:
        sequences = heads / spec.kv_heads
        pairs = sequences * np.minimum(reach, window)
        cached = pairs * spec.key_width * spec.kv_bytes
        ideally = ideal.seconds(pairs * spec.pair_flops, cached, sequences * new)
        looped = ideal.looped(pairs * spec.pair_flops, cached, sequences * new)
        measured = looped * np.exp(grid.at(heads, reach))
        swept = np.maximum(reach, np.minimum(_SWEPT * l2 / (heads * per_key), window))
        floor = (ideal.launch_s + sequences * new / ideal.bytes_s) * np.exp(grid.at(heads, SHORTEST))
        from_memory = floor + cached / (_STREAMED * ideal.bytes_s)
        return np.maximum(measured, np.minimum(ideally * np.exp(grid.at(heads, swept)), from_memory))

    surface = Surface.of(seconds, SHORTEST)
    if window < _EVERYTHING:
        return lambda load: surface.at(load.sequences * spec.kv_heads, load.context)
    return lambda load: surface.at(load.sequences * spec.kv_heads, pairs_of(spec, load) / load.tokens)


def _prefill(spec: Attention, table: Table, sms: float) -> Seconds:
    grid, ideal, window = sliced(table, spec.q_heads / spec.kv_heads), Ideal.of(table), _window(table)
    lone = table.axes[0][0]

    def seconds(rows: Array, reach: Array) -> Array:
        """rows: tokens x query heads."""
        if window < _EVERYTHING:  # beyond it loops grow no longer: what a lone head takes goes for fewer rows
            reach = np.maximum(np.minimum(reach, rows / lone), TILE)
        tokens = rows / spec.q_heads
        pairs = tokens * window_sum(reach, window) / reach
        cached = tokens * spec.key_width * spec.kv_bytes
        ideally = ideal.seconds(pairs * spec.pair_flops, cached, tokens * _new_bytes(spec))
        return ideally * np.exp(grid.at(rows / reach, reach))

    surface = Surface.of(seconds, TILE)
    append = spec.kv_heads * float(Append.of(table).at(spec.kv_heads))

    def price(load: Loads) -> Array:
        if window < _EVERYTHING:
            before = np.minimum(load.context, window)
            chunk = Causal.of(load.tokens, load.sequences, before + load.tokens / load.sequences / 2)
        else:
            chunk = Causal.of(load.tokens, load.sequences, pairs_of(spec, load) / load.tokens)
        full = surface.at(chunk.queries * spec.q_heads, chunk.reach)
        waves = np.maximum(lone * chunk.loop / _BLOCK / sms, 1.0)
        starved = surface.at(lone * chunk.loop, chunk.loop) / waves
        moved = ideal.launch_s + keys_of(spec, load) * spec.key_width * spec.kv_bytes / ideal.bytes_s
        found: Array = np.maximum(np.maximum(full, starved), moved) + load.tokens * append
        return found

    return price


def _window(table: Table) -> float:
    return float(table.info.key["window"]) or _EVERYTHING


def _new_bytes(spec: Attention) -> float:
    """Bytes per new token: its query, key, value and result, and the cache's copy of key and value."""
    wide = (spec.q_heads + spec.kv_heads) * (spec.qk_dim + spec.v_dim)
    return wide * spec.act_bytes + spec.key_width * spec.kv_bytes
