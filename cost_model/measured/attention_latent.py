"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) from measured tables of its parts.

    decode    the kernel over latents (sequences, context, heads), and the products absorbed into queries and
              results (tokens, heads)
    prefill   the kernel over expanded keys and values, a causal prompt of heads x prompts as for any
              attention, and the product that expands them, priced like any matrix product

A prompt with absorbed products (sparse attention: every token sees its own choice of keys) runs the decode
kernel with each token as a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.features import Array
from planc.cost_model.kernels import Attention, Gemm
from planc.cost_model.measured import gemm
from planc.cost_model.measured.attention_tables import (
    SHORTEST,
    TILE,
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
from planc.cost_model.profile import Grid, Profile, Table
from planc.cost_model.roofline import Roofline


def priced(
    spec: Attention, profile: Profile, gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> One | None:
    if not spec.key_flops:
        return _absorbed(spec, profile, engine.name)
    kernel = _expanded(spec, profile, engine.name)
    if kernel is None:
        return None
    expand, attend = _expansion(spec, gpu, engine, roofline), kernel.seconds
    return One(lambda load: attend(load) + expand(load), kernel.source)


def _format(spec: Attention, profile: Profile, engine: str, part: str) -> Table | None:
    apart = lambda table: (abs(float(table.info.key["kv_bytes"]) - spec.kv_bytes),)  # noqa: E731
    return nearest(profile, engine, apart, op="latent", part=part)


@lru_cache(maxsize=256)
def _absorbed(spec: Attention, profile: Profile, engine: str) -> One | None:
    table = _format(spec, profile, engine, "decode")
    products = nearest(profile, engine, lambda _: (), op="absorbed")
    if table is None or products is None:
        return None
    grid, ideal = sliced(table, spec.q_heads), Ideal.of(table)
    new = (
        spec.key_width * spec.kv_bytes + spec.pair_flops / 2.0 * spec.act_bytes
    )  # pair_flops: 2 H (2 R + Dr)
    around = _products(spec, products)

    def seconds(tokens: Array, reach: Array) -> Array:
        pairs = tokens * reach
        cached = pairs * spec.key_width * spec.kv_bytes
        ideally = ideal.seconds(pairs * spec.pair_flops, cached, tokens * new)
        return ideally * np.exp(grid.at(tokens, reach)) + around(tokens)

    surface = Surface.of(seconds, SHORTEST)
    return One(
        lambda load: surface.at(load.tokens, pairs_of(spec, load) / load.tokens), founded(table, engine)
    )


def _products(spec: Attention, table: Table) -> Callable[[Array], Array]:
    """Seconds of both products by tokens."""
    ideal, (tokens, heads) = Ideal.of(table), table.axes
    column = Grid((heads,), np.arange(heads.size, dtype=np.float64)).at(spec.q_heads / spec.gathered)
    low = min(int(column), max(heads.size - 2, 0))
    share = float(column) - low
    grid = Grid((tokens,), table.values[:, low] * (1 - share) + table.values[:, low + 1] * share)
    nothing = np.zeros(1)

    def seconds(count: Array) -> Array:
        weights = np.full_like(count, spec.weight_bytes)
        return ideal.seconds(count * spec.token_flops, weights, nothing) * np.exp(grid.at(count))

    return seconds


@lru_cache(maxsize=256)
def _expanded(spec: Attention, profile: Profile, engine: str) -> One | None:
    table = _format(spec, profile, engine, "prefill")
    if table is None:
        return None
    grid, ideal, wide = sliced(table, 1.0), Ideal.of(table), spec.qk_dim + spec.v_dim

    def seconds(rows: Array, reach: Array) -> Array:
        """rows: tokens x heads."""
        moved = rows * wide * spec.act_bytes
        new = moved + rows / spec.q_heads * spec.key_width * spec.kv_bytes
        flops = rows * (reach + 1) / 2.0 * 2.0 * wide
        return ideal.seconds(flops, moved, new) * np.exp(grid.at(rows / reach, reach))

    surface = Surface.of(seconds, TILE)

    def price(load: Loads) -> Array:
        chunk = Causal.of(load.tokens, load.sequences, pairs_of(spec, load) / load.tokens)
        return surface.at(chunk.queries * spec.q_heads, chunk.reach)

    return One(price, founded(table, engine))


def _expansion(spec: Attention, gpu: Gpu, engine: EngineProfile, roofline: Roofline) -> Seconds:
    """[keys, R] @ [R, H (Dn + Dv)]; R from the operations per key and the widths that the op states."""
    a, b, area = float(spec.qk_dim + spec.v_dim), spec.key_width, spec.key_flops / 2.0 / spec.q_heads
    rotary = (a + b - np.sqrt((a - b) ** 2 + 4.0 * area)) / 2.0  # (a - Dr) (b - Dr) = area
    product = Gemm(spec.q_heads * (a - rotary), b - rotary, "bf16", "bf16", spec.act_bytes)
    costs = gemm.prepare([product], gpu, engine, roofline)
    return lambda load: costs(keys_of(spec, load)[None, :]).seconds[0]
