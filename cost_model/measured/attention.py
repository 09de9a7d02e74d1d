"""Attention from measured tables of the engines' kernels, looked up by work that kernels see alike.

A table's residual depends on how much runs side by side and how long each loop over keys is:

    decode   (heads, context, group)   heads: sequences x KV heads; context: keys that a token sees
    prefill  (heads, tokens, group)    heads: prompts x query heads; tokens: length of a causal prompt

with group = query heads per KV head. A chunk of q tokens after p cached ones is looked up as the causal
prompt that has as many query tiles and as long loops: x = q + 2p tokens and heads * q / x heads, which
attends to as many (query, key) pairs. A sliding window that was measured has a table of its own; any other
span is priced as full attention to the keys it sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.features import Array
from planc.cost_model.kernels import Attention, AttentionLoad, Priced, Times
from planc.cost_model.measured import attention_latent
from planc.cost_model.measured.attention_tables import Ideal, Loads, Price, nearest, pairs_of, sliced
from planc.cost_model.profile import Profile, Table, shipped
from planc.cost_model.roofline import Roofline


def prepare(
    specs: Sequence[Attention], gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Priced[AttentionLoad, Times]:
    """Kernels that no table covers cost what the roofline says."""
    profile = shipped("attention", gpu.name)
    found = [None if profile is None else _price(spec, profile, gpu, engine, roofline) for spec in specs]
    rest = [i for i, price in enumerate(found) if price is None]
    physics = roofline.attention([specs[i] for i in rest]) if rest else None

    def price(load: AttentionLoad) -> Times:
        seconds = np.empty_like(load.flops)
        bound: npt.NDArray[np.int8] = np.empty(load.flops.shape, dtype=np.int8)
        if physics is not None:
            times = physics(_only(load, rest))
            seconds[rest], bound[rest] = times.seconds, times.bound
        for row, measured in enumerate(found):
            if measured is not None:
                seconds[row], bound[row] = measured(_row(load, row))
        return Times(np.where(load.tokens > 0, seconds, 0.0), bound)

    return Priced(price, tuple(roofline.source if price is None else "measured" for price in found))


def _only(load: AttentionLoad, rows: Sequence[int]) -> AttentionLoad:
    part = list(rows)
    return AttentionLoad(
        load.flops[part], load.kv[part], load.acts[part], load.tokens, load.sequences, load.context
    )


def _row(load: AttentionLoad, row: int) -> Loads:
    tokens, sequences = np.maximum(load.tokens, 1.0), np.maximum(load.sequences, 1.0)
    return Loads(load.flops[row], load.kv[row], load.acts[row], tokens, sequences, load.context)


def _price(
    spec: Attention, profile: Profile, gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Price | None:
    if spec.kind != "attention" or not (spec.kv_heads and spec.pair_flops and spec.key_width):
        return None
    if spec.latent:
        return attention_latent.price(spec, profile, gpu, engine, roofline)
    return _softmax(spec, profile, engine.name)


def _softmax(spec: Attention, profile: Profile, engine: str) -> Price | None:
    """Prices multi-head or grouped-query attention from the table that fits it best."""
    window = float(spec.span[1:]) if spec.span[:1] == "w" else 0.0

    def distance(table: Table) -> tuple[float, ...]:
        key = table.info.key
        theirs = float(key["window"])
        unlike = (
            0.0 if theirs == window else 1.0 if theirs == 0 else 1.0 + abs(np.log(theirs / (window or 1.0)))
        )
        if theirs and not (window and 0.5 <= theirs / window <= 2.0):
            unlike = np.inf
        head = abs(np.log(float(key["head_dim"]) / spec.qk_dim))
        return head, unlike, abs(float(key["kv_bytes"]) - spec.kv_bytes)

    table = nearest(profile, engine, distance, op="softmax", part=spec.part)
    if table is None or not np.isfinite(distance(table)[1]):
        return None
    grid, ideal = sliced(table, spec.q_heads / spec.kv_heads), Ideal.of(table)
    windowed = float(table.info.key["window"])

    def price(load: Loads) -> tuple[Array, npt.NDArray[np.int8]]:
        written = load.tokens * spec.key_width
        cached = (load.kv - written) * spec.kv_bytes
        new = written * spec.kv_bytes + load.acts * spec.act_bytes
        if spec.part == "decode":
            seen = load.context if windowed else pairs_of(spec, load) / load.tokens
            heads = load.sequences * spec.kv_heads
        else:
            if windowed:
                seen = load.tokens / load.sequences + 2.0 * np.minimum(load.context, windowed)
            else:
                seen = np.maximum(2.0 * pairs_of(spec, load) / load.tokens - 1.0, 1.0)
            heads = load.tokens * spec.q_heads / seen
        seconds = ideal.seconds(load.flops, cached, new) * np.exp(grid.at(heads, seen))
        return seconds, ideal.bound(load.flops, cached, new)

    return price
