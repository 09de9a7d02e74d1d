"""Tables of prefill attention with what writing keys and values to the cache takes.

Engines write a prompt's keys and values with a kernel of its own, whose time by KV heads has nothing to do
with how many heads attend: rows of few heads fill too few threads. Tables see heads x prompts alone, so rows
at one node differ by it. It is fitted in turn with the nodes, and kept where it explains a tenth of the
errors.
"""

from __future__ import annotations

import numpy as np

from planc.cost_model.features import Array
from planc.cost_model.fitting import surface
from planc.cost_model.fitting.attention_rows import Rows
from planc.cost_model.measured.attention_tables import Append, Ideal
from planc.cost_model.profile import Grid, Table

_TURNS = 2
_EXPLAINS = 0.9  # of the mean error without
_LEAST = 0.2  # of a row's time stays attention's


def seconds(table: Table, rows: Rows) -> Array:
    """What a table says of rows."""
    ideally = Ideal.of(table).looped(rows.flops, rows.cached, rows.new)
    return _together(table.grid, Append.of(table), rows, ideally)


def fitted(rows: Rows, axes: tuple[Array, ...], ideally: Array) -> tuple[Array, int, Append]:
    """Values at the nodes relative to `ideally` [rows] seconds, rows set aside, and the cost of writing."""
    coords, nothing = tuple(rows.coords.values()), Append.nothing()
    plain, dropped = surface.nodes(axes, coords, np.log(rows.seconds / ideally))
    if rows.kv_heads is None or np.ptp(rows.kv_heads) == 0:
        return plain, dropped, nothing
    values, aside, append = plain, dropped, nothing
    for _ in range(_TURNS):
        left = rows.seconds - ideally * np.exp(Grid(axes, values).at(*coords))
        append = _append(rows, rows.kv_heads, left)
        rest = np.maximum(rows.seconds - _written(rows, append), _LEAST * rows.seconds)
        values, aside = surface.nodes(axes, coords, np.log(rest / ideally))
    before, after = (
        np.mean(np.abs(np.log(_together(Grid(axes, nodes), cost, rows, ideally) / rows.seconds)))
        for nodes, cost in ((plain, nothing), (values, append))
    )
    return (values, aside, append) if after < _EXPLAINS * before else (plain, dropped, nothing)


def _together(grid: Grid, append: Append, rows: Rows, ideally: Array) -> Array:
    found: Array = ideally * np.exp(grid.at(*rows.coords.values())) + _written(rows, append)
    return found


def _written(rows: Rows, append: Append) -> Array | float:
    return 0.0 if rows.kv_heads is None else _key_heads(rows) * append.at(rows.kv_heads)


def _key_heads(rows: Rows) -> Array:
    """Tokens times KV heads."""
    heads, reach, group = rows.coords.values()
    found: Array = heads * reach / group
    return found


def _append(rows: Rows, kv_heads: Array, left: Array) -> Append:
    """Seconds per token and KV head by KV heads, more than the least: the median of what is `left` over, in
    the half of the rows where it weighs most."""
    written, counts, found = _key_heads(rows), np.unique(kv_heads), []
    for count in counts:
        mine = kv_heads == count
        weighs = written[mine] / rows.seconds[mine]
        telling = weighs >= np.median(weighs)
        found.append(np.median((left[mine] / written[mine])[telling]))
    return Append(counts, np.array(found) - np.min(found))
