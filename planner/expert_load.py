"""Routing statistics of a request: tokens of each expert in each layer, from a file.

`workload.expert_load` names it: JSON (a list of layers, each a list of counts) or text with one layer per
line and counts separated by commas. One layer stands for all. Any unit does; only shares count.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model.expert_placement import physical_map
from planc.cost_model.routing import ExpertLoad
from planc.cost_model.table import CostTable
from planc.errors import FileUnreadable, InvalidField
from planc.planner.candidates import Candidate
from planc.planner.plan import ExpertMap, Pool
from planc.planner.request import Request, read_bytes

#: engines that place experts by load, with copies (vLLM: --enable-eplb)
_BALANCING = frozenset({"vllm"})

#: slots of every rank that may hold second copies, and by what share the fullest rank must get lighter
_COPIES, _WORTH = (1, 2, 4), 0.02


def with_expert_load(request: Request, table: CostTable) -> CostTable:
    """The table, priced for the statistics that the request names; as it is where it names none."""
    name = request.workload.expert_load
    if name is None or table.expert_load is not None:
        return table
    return replace(table, expert_load=read(request.path(name), table))


def expert_maps(table: CostTable, pools: Sequence[Pool]) -> list[ExpertMap]:
    """Where experts lie in a plan's expert-parallel engines, once for each number of ranks and copies."""
    load = table.expert_load
    replicas = [replica for pool in pools for replica in pool.replicas if replica.ep > 1]
    degrees = sorted({(replica.ep, replica.expert_copies) for replica in replicas})
    if load is None:
        return []
    return [
        ExpertMap(
            ranks=ranks,
            copies=copies,
            imbalance=load.imbalance(ranks, copies),
            bound=float(np.mean([one.bound / one.tokens.mean() for one in load.placements(ranks, copies)])),
            physical_to_logical=physical_map(load.placements(ranks, copies)),
        )
        for ranks, copies in degrees
    ]


def with_copies(candidates: Sequence[Candidate], table: CostTable) -> list[Candidate]:
    """The candidates, and expert-parallel ones again with slots for second copies of busy experts, where the
    counts say that these make the fullest rank lighter. What they cost in memory, the search weighs."""
    load, found = table.expert_load, []
    for candidate in candidates:
        found.append(candidate)
        shape = candidate.shape
        if load is None or shape.ep == 1 or shape.engine not in _BALANCING:
            continue
        best = load.imbalance(shape.ep)
        for copies in _COPIES:
            if copies + table.model.experts // shape.ep > table.model.experts:
                break
            lighter = load.imbalance(shape.ep, copies)
            if lighter < best * (1 - _WORTH):
                best = lighter
                found.append(replace(candidate, shape=replace(shape, copies=copies)))
    return found


def read(path: Path, table: CostTable) -> ExpertLoad:
    """Counts of a file, checked against the model. Raises FileMissing, FileUnreadable, InvalidField."""
    rows = _rows(path, read_bytes(path, "expert load"))

    def wrong(reason: str, mend: str) -> InvalidField:
        return InvalidField(where="workload", field="expert_load", value=str(path), reason=reason, mend=mend)

    experts = table.model.experts
    if not experts:
        raise wrong(f"{table.model.name} has no routed experts", "Leave the file out.")
    if not rows:
        raise wrong("the file holds no layer", "Write one line of counts per layer, or one for all.")
    for number, row in enumerate(rows):
        if len(row) != experts:
            raise wrong(
                f"layer {number} has {len(row)} counts, the model {experts} experts",
                "Give every expert's tokens.",
            )
    counts = np.array(rows)
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise wrong("counts below zero, or no numbers", "Give numbers of tokens.")
    if (counts.sum(axis=1) <= 0).any():
        raise wrong("a layer without any token", "Leave layers out that were not counted.")
    return ExpertLoad(counts)


def _rows(path: Path, data: bytes) -> list[list[float]]:
    unreadable = lambda reason: FileUnreadable(  # noqa: E731
        what="expert load", path=path, format="counts", reason=reason, mend="One layer per line: 12,40,3,..."
    )
    try:
        text = data.decode("utf-8-sig")
        if path.suffix == ".json":
            found: Any = json.loads(text)
            if not isinstance(found, list) or not all(isinstance(row, list) for row in found):
                raise unreadable("not a list of lists")
        else:
            found = [row for row in csv.reader(StringIO(text)) if row]
        return [[float(value) for value in row] for row in found]
    except (ValueError, TypeError) as error:
        raise unreadable(str(error)) from None
