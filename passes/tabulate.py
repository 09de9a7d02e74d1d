"""Tabulate: from a traced graph to the cost table, which is all that the search reads.

    traced --FRONT--> canonical --phases--> prefill, decode --fold--> one layer of each class
        --declared work, shardings, fusions--> rows

This file imports no torch, so that a table in the cache is read in milliseconds; how one is made
is in `planc.passes.rows`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from planc.cost_model.table import CostTable
from planc.ir.trace import cache as entries
from planc.ir.trace import kind_of
from planc.ir.trace.fingerprint import fingerprint
from planc.ir.trace.hf_config import model_name

if TYPE_CHECKING:
    from planc.ir.graph import Graph

_LOG = logging.getLogger("planc")


def load_table(
    source: str | Path, *, trust_remote_code: bool = False, cache: Path | None = None
) -> CostTable:
    """The cost table of a model: from the cache, or traced and tabulated now and stored.

    On a hit nothing heavy is imported, torch least of all. Factories are code, whose identity
    planc cannot know, and are traced each time. `cache` as in `planc.ir.trace.cache.folder`.

    Raises what `planc.ir.trace.trace` and `tabulate` raise.
    """
    if kind_of(source) == "factory":
        return _make(source, trust_remote_code, cache, None)
    name = f"{entries.key(source)}.table.json"
    text = entries.read(cache, name)
    if text is not None:
        try:
            return _named(CostTable.from_json(text), Path(source))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            _LOG.warning("cache entry %s does not load (%s); it is made anew", name, error)
    table = _named(_make(source, trust_remote_code, cache, fingerprint(source)), Path(source))
    entries.write(cache, name, table.to_json())
    return table


def _named(table: CostTable, source: Path) -> CostTable:
    """Cache entries are found by content: the same configuration may lie elsewhere under another name."""
    return replace(table, model=replace(table.model, name=model_name(source)))


def tabulate(traced: Graph, *, model_fingerprint: str | None = None) -> CostTable:
    """The cost table of a traced graph (one that no pass has touched).

    Parameters count once however many names they have; a class's are those of one of its layers.
    Encoders and plain modules have no phases: their rows are those of the traced graph, as "prefill".
    Raises UnsupportedModel where a language model's phases cannot be derived.
    """
    from planc.passes.rows import table_of

    return table_of(traced, model_fingerprint)


def _make(source: str | Path, trust: bool, cache: Path | None, model_fingerprint: str | None) -> CostTable:
    from planc.ir.trace import trace

    graph = trace(source, trust_remote_code=trust, cache=cache)
    return tabulate(graph, model_fingerprint=model_fingerprint)
