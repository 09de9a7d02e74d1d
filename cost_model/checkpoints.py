"""Published checkpoints: what they keep in another format than the one that they are named by.

"nvfp4" of DeepSeek-R1 says what its experts have; its attention stays in bf16. See `data/checkpoints.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from planc.cost_model.catalogue import Entry, read
from planc.cost_model.parts import Exceptions, module_of, scheme
from planc.cost_model.table import CostTable


class Kept(Entry):
    """`parts` of models of some types, in checkpoints named by `weights`: module or matrix -> scheme."""

    model_types: tuple[str, ...]
    weights: str
    parts: Mapping[str, str]
    checkpoint: str


def as_published(table: CostTable, weights: str) -> CostTable:
    """The table of the checkpoint in this format: "fp8_block" has a scale per block of weights, and so have
    the "fp8" ones of some families, published beside a bf16 one."""
    model = table.model
    blocks = weights == "fp8_block" or (weights == "fp8" and model.model_type in _block_scaled())
    if model.block_scales or not blocks:
        return table
    name = f"{table.fingerprint}, block scales"
    return replace(table, model=replace(model, block_scales=True), fingerprint=name)


def kept(table: CostTable, weights: str) -> Exceptions:
    """Exceptions of an engine's shape that serves the published checkpoint of a model in this format."""
    parts: dict[str, str] = {}
    for entry in _kept():
        if entry.weights == weights and table.model.model_type in entry.model_types:
            parts |= entry.parts
    found: dict[str, str] = {}
    for rows in table.rows.values():
        for row in rows:
            if "weight" not in row.quantizable:
                continue
            for name in (module_of(row.site, row.work.family), row.site):
                if name in parts:
                    found[f"{row.layer_class}:{name}"] = "/".join(scheme(parts[name]))
    return tuple(sorted(found.items()))


@cache
def _kept() -> tuple[Kept, ...]:
    return tuple(Kept(**entry) for entry in read("checkpoints.yaml")["kept"])


@cache
def _block_scaled() -> frozenset[str]:
    return frozenset(read("checkpoints.yaml")["block_scaled_fp8"])
