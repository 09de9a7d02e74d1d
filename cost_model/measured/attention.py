"""Attention from measured tables: softmax attention of each engine, by work that its kernels see alike.

A table's residual depends on how much runs side by side and how long each loop over keys is:

    decode   (heads, context, group)   heads: sequences x KV heads; context: keys that a token sees
    prefill  (heads, tokens, group)    heads: prompts x query heads; tokens: length of a causal prompt

with group = query heads per KV head. A chunk of q tokens after p cached ones is looked up as the causal
prompt that has as many query tiles and as long loops: x = q + 2p tokens and heads * q / x heads, which
attends to as many (query, key) pairs. A sliding window that was measured has a table of its own; any other
span is priced as full attention to the keys it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.features import Array
from planc.cost_model.kernels import COMPUTE, LAUNCH, MEMORY, Attention, AttentionLoad, Times
from planc.cost_model.profile import Grid, Profile, Table, shipped
from planc.cost_model.roofline import Roofline

#: whose kernels stand in for an engine without a table, nearest first
_KIN = {
    "vllm": ("vllm", "sglang", "trtllm"),
    "sglang": ("sglang", "vllm", "trtllm"),
    "trtllm": ("trtllm", "sglang", "vllm"),
}


@dataclass(frozen=True, slots=True)
class Ideal:
    """What a table's values are relative to: launch + max(flops / peak, cached / bandwidth) + new / bandwidth.

    cached   bytes of keys and values that queries read
    new      bytes of queries, results, and keys and values appended; another kernel may move them
    """

    flops_s: float
    bytes_s: float
    launch_s: float

    def seconds(self, flops: Array, cached: Array, new: Array) -> Array:
        found: Array = (
            self.launch_s + np.maximum(flops / self.flops_s, cached / self.bytes_s) + new / self.bytes_s
        )
        return found

    def bound(self, flops: Array, cached: Array, new: Array) -> Array:
        compute, memory = flops / self.flops_s, cached / self.bytes_s
        found = np.where(compute > memory, COMPUTE, MEMORY)
        return np.where(np.maximum(compute, memory) + new / self.bytes_s < self.launch_s, LAUNCH, found)


def prepare(
    specs: Sequence[Attention], gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Callable[[AttentionLoad], Times]:
    profile = shipped("attention", gpu.name)
    fallback = roofline.attention(specs)
    found = [None if profile is None else _softmax(spec, profile, engine.name) for spec in specs]
    if not any(found):
        return fallback

    def price(load: AttentionLoad) -> Times:
        times = fallback(load)
        for row, measured in enumerate(found):
            if measured is not None:
                times.seconds[row], times.bound[row] = measured(_row(load, row))
        return times

    return price


def _row(load: AttentionLoad, row: int) -> AttentionLoad:
    return AttentionLoad(
        load.flops[row], load.kv[row], load.acts[row], load.tokens, load.sequences, load.context
    )


def _softmax(
    spec: Attention, profile: Profile, engine: str
) -> Callable[[AttentionLoad], tuple[Array, Array]] | None:
    """Prices one spec from the table that fits it best; None where no table fits."""
    if spec.kind != "attention" or spec.latent or not spec.kv_heads or not spec.qk_dim:
        return None
    table = _choose(spec, profile, engine)
    if table is None:
        return None
    decode, group = spec.part == "decode", spec.q_heads / spec.kv_heads
    grid = sliced(table, group)
    ideal = Ideal(**{name: table.info.ideal[name] for name in ("flops_s", "bytes_s", "launch_s")})
    per_pair = 2.0 * spec.q_heads * (spec.qk_dim + spec.v_dim)
    per_key = spec.kv_heads * (spec.qk_dim + spec.v_dim)
    windowed = float(table.info.key["window"])

    def price(load: AttentionLoad) -> tuple[Array, Array]:
        active = load.tokens > 0
        sequences = np.maximum(load.sequences, 1.0)
        tokens = np.maximum(load.tokens, 1.0)
        written = load.tokens * per_key
        cached, new = (
            (load.kv - written) * spec.kv_bytes,
            written * spec.kv_bytes + load.acts * spec.act_bytes,
        )
        pairs = load.flops / per_pair
        if decode:
            reach = np.maximum(load.context if windowed else pairs / tokens, 1.0)
            residual = grid.at(sequences * spec.kv_heads, reach)
        else:
            each = tokens / sequences
            if windowed:
                reach = each + 2.0 * np.minimum(load.context, windowed)
            else:
                reach = np.maximum(2.0 * pairs / tokens - 1.0, 1.0)
            residual = grid.at(tokens * spec.q_heads / reach, reach)
        seconds = ideal.seconds(load.flops, cached, new) * np.exp(residual)
        return np.where(active, seconds, 0.0), ideal.bound(load.flops, cached, new)

    return price


def _choose(spec: Attention, profile: Profile, engine: str) -> Table | None:
    """The engine's own table before another's; then the cache's format, the window, the nearest head."""
    kin = _KIN.get(engine, tuple(_KIN))
    window = float(spec.span[1:]) if spec.span[:1] == "w" else 0.0

    def distance(table: Table) -> tuple[float, ...]:
        key = table.info.key
        theirs = float(key["window"])
        other = 0.0 if (theirs == window or (theirs and window and 0.5 <= theirs / window <= 2.0)) else 1.0
        return (
            kin.index(str(key["engine"])),
            abs(np.log(float(key["head_dim"]) / spec.qk_dim)),
            other,
            abs(float(key["kv_bytes"]) - spec.kv_bytes),
            theirs,
        )

    fitting = [
        table
        for table in profile.find(op="softmax", part=spec.part)
        if table.info.key["engine"] in kin and (table.info.key["window"] == 0 or window)
    ]
    return min(fitting, key=distance, default=None)


def sliced(table: Table, group: float) -> Grid:
    """The first two axes of a table at one value of the third."""
    heads, reach, groups = table.axes
    one = Grid((groups,), np.arange(groups.size, dtype=np.float64)).at(group)
    low = int(np.floor(one))
    share = float(one - low)
    values = table.values[:, :, low] * (1 - share)
    if share:
        values = values + table.values[:, :, low + 1] * share
    return Grid((heads, reach), np.ascontiguousarray(values))
