"""Context parallelism: cp of the tp ranks share the tokens of a cache of which each would else hold a copy.

A rank attends with the queries of all cp ranks to its own share of the keys. The partial results are
weighted by their softmax sums and added up, which is exact (Milakov & Gimelshein 2018; between GPUs Helix,
Bhatia et al., arXiv 2507.07120; vLLM 0.32's `decode_context_parallel_size`, v1/attention/ops/dcp.py). With
H = cp * heads of a rank, q and v elements of a head's query and result, T tokens and C cached before a step:

    decode, and prompts over keys and values    all-gather of queries [T, H, q] and of log-sums [T, H, cp] in
                                                fp32, reduce-scatter of results [T, H, v]
    prompts over latent caches                  all-gather of the cached entries [C, q], then as without cp

Left out: that a first chunk with nothing cached needs no exchange, and that a chunk's cached and new keys are
two kernels. Engines that pack results and sums into one all-to-all, or compute the queries of all ranks on
each, send about as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from planc.cost_model.collectives import Kind
from planc.cost_model.formats import fmt
from planc.cost_model.kernels import Part
from planc.cost_model.local import factors, unquantized
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import Row
from planc.ir.work import Amount

_SUM = 4.0  # bytes of a log-sum


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective among cp ranks: `size` in bytes, as `collectives.seconds` wants it."""

    part: Part
    kind: Kind
    size: Amount


def gathered(flops: Amount, cp: int) -> Amount:
    """FLOPs of one rank's decode attention: all ranks' queries meet its keys, projections stay its own."""
    return Amount({name: value * (cp if name[:2] == "P:" else 1) for name, value in flops.terms.items()})


def widths(row: Row, shape: EngineShape) -> tuple[float, float, float]:
    """Of the gathered heads of one rank: how many, and elements per token of their queries and results.

    A (query, key) pair takes 2 (q + v) operations per head, q of the query as wide as a cached entry where
    the cache is latent.
    """
    dims, divided = row.work.dims, factors(row, shape)
    heads = dims["q_heads"] * divided.heads * shape.cp
    pair = sum(value for name, value in row.work.flops.terms.items() if name[:2] == "P:")
    query = row.work.kv_writes.terms["T"] if dims.get("latent") else float(dims["qk_dim"])
    return heads, heads * query, heads * (pair / 2.0 / dims["q_heads"] - query)


def merge_bytes(row: Row, shape: EngineShape) -> Amount:
    """What weighting a rank's partial results moves: read and written once."""
    _, _, results = widths(row, shape)
    return Amount({"T": 2.0 * results * fmt(unquantized(shape)).bytes})


def exchanges(row: Row, part: Part, shape: EngineShape) -> list[Exchange]:
    """Collectives around an attention op, of which a table has one row per phase."""
    wide = fmt(unquantized(shape)).bytes
    latent = bool(row.work.dims.get("latent"))
    if part == "prefill":
        if not latent:
            return []  # one exchange for all tokens of a step, see decode
        entry = row.work.kv_writes.terms["T"] * fmt(shape.kv_format(row.layer_class)).bytes
        cached = Amount({"K:full": entry, "T": -entry})
        return [Exchange("prefill", "all_gather", cached)]
    heads, queries, results = widths(row, shape)
    seen: Part = "decode" if latent else "step"
    return [
        Exchange(seen, "all_gather", Amount({"T": queries * wide})),
        Exchange(seen, "all_gather", Amount({"T": heads * shape.cp * _SUM})),
        Exchange(seen, "reduce_scatter", Amount({"T": results * wide})),
    ]
