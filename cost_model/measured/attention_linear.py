"""Linear attention (gated delta rule) and its short convolution from measured tables.

Both keep a state per sequence: the rule one matrix per head, the convolution the last few tokens of each
channel. Tables have axes (heads, reach): heads of all sequences, or channels in blocks of 128; and new
tokens of each sequence, 1 in decode.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from planc.cost_model.features import Array
from planc.cost_model.kernels import Attention
from planc.cost_model.measured.attention_tables import Ideal, One, Surface, founded, nearest
from planc.cost_model.profile import Profile

#: channels of a convolution that count as one head; the rule's heads keep more state than this
BLOCK = 128.0


@lru_cache(maxsize=256)
def priced(spec: Attention, profile: Profile, engine: str) -> One | None:
    if not (spec.q_heads and spec.key_width and spec.token_flops):
        return None
    rule = spec.key_width / spec.q_heads > BLOCK
    table = nearest(profile, engine, lambda _: (), op="rule" if rule else "convolution", part=spec.part)
    if table is None:
        return None
    ideal, grid = Ideal.of(table), table.grid
    units = spec.q_heads if rule else spec.q_heads / BLOCK

    def seconds(heads: Array, reach: Array) -> Array:
        work = linear_work(rule, heads, reach, spec.token_flops / units, spec.key_width / units)
        return ideal.seconds(*work) * np.exp(grid.at(heads, reach))

    surface = Surface.of(seconds, 1.0)
    return One(
        lambda load: surface.at(load.sequences * units, load.tokens / load.sequences), founded(table, engine)
    )


def linear_work(
    rule: bool, heads: Array, reach: Array, flops: float, state: float
) -> tuple[Array, Array, Array]:
    """Operations and bytes, as `Ideal.seconds` takes them, from the operations of a token and the elements of
    the state of one head: state in fp32, queries, keys, values and results in bf16."""
    width = 4.0 * np.sqrt(state) if rule else 2.0 * BLOCK
    tokens = heads * reach
    return tokens * flops, 2.0 * heads * state * 4.0 + 0.0 * tokens, tokens * width * 2.0
