"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) from measured tables of its parts.

    decode    the kernel over latents (sequences, context, heads), and the products absorbed into queries and
              results (tokens, heads)
    prefill   the kernel over expanded keys and values, a causal prompt of heads x prompts as for any
              attention, and the product that expands them, priced like any matrix product

A prompt with absorbed products (sparse attention: every token sees its own choice of keys) runs the decode
kernel with each token as a sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.features import Array
from planc.cost_model.kernels import Attention, Gemm
from planc.cost_model.measured import gemm
from planc.cost_model.measured.attention_tables import Ideal, Loads, Price, nearest, pairs_of, sliced
from planc.cost_model.profile import Grid, Profile, Table
from planc.cost_model.roofline import Roofline


def price(
    spec: Attention, profile: Profile, gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Price | None:
    kernel: Price | None
    rest: Price | None
    if spec.key_flops:
        kernel, rest = _expanded(spec, profile, engine.name), _expansion(spec, gpu, engine, roofline)
    else:
        kernel, rest = _absorbed(spec, profile, engine.name), _products(spec, profile, engine.name)
    if kernel is None or rest is None:
        return None

    def both(load: Loads) -> tuple[Array, npt.NDArray[np.int8]]:
        seconds, bound = kernel(load)
        return seconds + rest(load)[0], bound

    return both


def _format(spec: Attention, profile: Profile, engine: str, part: str) -> Table | None:
    return nearest(
        profile,
        engine,
        lambda table: (abs(float(table.info.key["kv_bytes"]) - spec.kv_bytes),),
        op="latent",
        part=part,
    )


def _absorbed(spec: Attention, profile: Profile, engine: str) -> Price | None:
    table = _format(spec, profile, engine, "decode")
    if table is None:
        return None
    grid, ideal = sliced(table, spec.q_heads), Ideal.of(table)
    width = spec.pair_flops / 2.0  # query and result elements per token: H (2 R + Dr)

    def price(load: Loads) -> tuple[Array, npt.NDArray[np.int8]]:
        pairs = pairs_of(spec, load)
        cached = pairs * spec.key_width * spec.kv_bytes
        new = load.tokens * (spec.key_width * spec.kv_bytes + width * spec.act_bytes)
        flops = pairs * spec.pair_flops
        seconds = ideal.seconds(flops, cached, new) * np.exp(grid.at(load.tokens, pairs / load.tokens))
        return seconds, ideal.bound(flops, cached, new)

    return price


def _products(spec: Attention, profile: Profile, engine: str) -> Price | None:
    table = nearest(profile, engine, lambda table: (), op="absorbed")
    if table is None:
        return None
    ideal, (tokens, heads) = Ideal.of(table), table.axes
    share = Grid((heads,), np.arange(heads.size, dtype=np.float64)).at(spec.q_heads)
    low = int(share)
    high = min(low + 1, heads.size - 1)
    grid = Grid((tokens,), table.values[:, low] * (1 - (share - low)) + table.values[:, high] * (share - low))

    def price(load: Loads) -> tuple[Array, npt.NDArray[np.int8]]:
        flops = load.tokens * spec.token_flops
        cached, new = np.full_like(flops, spec.weight_bytes), np.zeros_like(flops)
        return ideal.seconds(flops, cached, new) * np.exp(grid.at(load.tokens)), ideal.bound(
            flops, cached, new
        )

    return price


def _expanded(spec: Attention, profile: Profile, engine: str) -> Price | None:
    table = _format(spec, profile, engine, "prefill")
    if table is None:
        return None
    grid, ideal = sliced(table, 1.0), Ideal.of(table)
    query, result = spec.q_heads * spec.qk_dim, spec.q_heads * spec.v_dim

    def price(load: Loads) -> tuple[Array, npt.NDArray[np.int8]]:
        pairs = pairs_of(spec, load)
        seen = np.maximum(2.0 * pairs / load.tokens - 1.0, 1.0)
        keys = load.kv / spec.key_width - load.tokens
        cached = keys * (query + result) * spec.act_bytes
        new = load.tokens * ((query + result) * spec.act_bytes + spec.key_width * spec.kv_bytes)
        flops = pairs * spec.pair_flops
        residual = grid.at(load.tokens * spec.q_heads / seen, seen)
        return ideal.seconds(flops, cached, new) * np.exp(residual), ideal.bound(flops, cached, new)

    return price


def _expansion(spec: Attention, gpu: Gpu, engine: EngineProfile, roofline: Roofline) -> Price:
    """[keys, R] @ [R, H (Dn + Dv)]; R from the operations per key and the widths that the op states."""
    a, b, area = float(spec.qk_dim + spec.v_dim), spec.key_width, spec.key_flops / 2.0 / spec.q_heads
    rotary = (a + b - np.sqrt((a - b) ** 2 + 4.0 * area)) / 2.0  # (a - Dr) (b - Dr) = area
    product = Gemm(spec.q_heads * (a - rotary), b - rotary, "bf16", "bf16", spec.act_bytes)
    costs = gemm.prepare([product], gpu, engine, roofline)

    def price(load: Loads) -> tuple[Array, npt.NDArray[np.int8]]:
        times = costs((load.kv / spec.key_width - load.tokens)[None, :])
        return times.seconds[0], times.bound[0]

    return price
