"""Speculative decoding: tokens per step, and what verifying and drafting them takes.

A step drafts k tokens of every decoding sequence and verifies them beside its next one. With a chance a that
a drafted token is accepted, given that those before it were, a sequence gains

    1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a)                     (Leviathan et al., ICML 2023, eq. 1)

tokens per step. Verification computes k + 1 rows per sequence and reads each cache once. Drafting takes k
passes through the draft: a layer like the model's last one and the output head (MTP, EAGLE), or as many such
layers as the draft model has parameters for. N-grams are looked up by the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from typing import Literal, get_args

import numpy as np
import yaml

from planc.cost_model.features import Array, StepLoad
from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable, LayerClass

Method = Literal["ngram", "draft_model", "mtp", "eagle", "eagle3"]
METHODS: tuple[str, ...] = get_args(Method)

#: batch at which the growth of a pass with its sequences is read off, and a context that is usual
_WIDE, _CONTEXT = 128.0, 2048.0


@dataclass(frozen=True, slots=True, order=True)
class Speculation:
    """How tokens are drafted.

    draft        tokens per sequence and step
    acceptance   chance that a drafted token is accepted, given that those before it were
    model        the draft's checkpoint, where the method needs one
    parameters   of the draft model
    """

    method: Method
    draft: int
    acceptance: float
    model: str = ""
    parameters: float = 0.0

    @property
    def pace(self) -> float:
        """Mean tokens of a sequence per step."""
        return expected_tokens(self.acceptance, self.draft)

    @property
    def rows(self) -> int:
        """Rows that a step computes for each decoding sequence."""
        return 1 + self.draft

    @property
    def label(self) -> str:
        return f"{self.method}:{self.draft}@{self.acceptance:g}"

    def layers(self, table: CostTable) -> int:
        """Layers like the model's last one that the draft weighs."""
        if self.method == "ngram":
            return 0
        if self.method == "draft_model":
            return max(math.ceil(self.parameters / _last(table).parameters), 1)
        return 1


def expected_tokens(acceptance: float, draft: int) -> float:
    """Mean tokens of a sequence per step."""
    return sum(acceptance**k for k in range(draft + 1))


def with_draft(table: CostTable, speculation: Speculation | None) -> CostTable:
    """The table with the draft's layers added: what weights and cache are counted on."""
    more = speculation.layers(table) if speculation is not None else 0
    if not more:
        return table
    last, layers = _last(table), table.model.layers
    grown = replace(last, count=last.count + more, layers=(*last.layers, *range(layers, layers + more)))
    classes = tuple(grown if cls.name == last.name else cls for cls in table.classes)
    return replace(table, classes=classes, model=replace(table.model, layers=layers + more))


@dataclass(frozen=True, slots=True)
class Drafting:
    """What speculation adds to the steps of one engine: verification by its step model, and drafting,
    `fixed_s` + `per_sequence_s` * sequences in every step that decodes."""

    model: StepModel
    speculation: Speculation
    fixed_s: float
    per_sequence_s: float

    def seconds(self, load: StepLoad) -> Array:
        """Beside those of the step without speculation, in the common shape of the load's fields."""
        flat = load.arrays()
        more = StepLoad(
            flat.seqs * self.speculation.rows, flat.context, flat.tokens, flat.chunks, flat.cached
        )
        one = StepLoad(flat.seqs, flat.context, flat.tokens, flat.chunks, flat.cached)
        verified = (self.model.pieces(more).shared - self.model.pieces(one).shared).max(axis=0)
        drafted = np.where(flat.seqs > 0, self.fixed_s + self.per_sequence_s * flat.seqs, 0.0)
        found: Array = (np.maximum(verified, 0.0) + drafted).reshape(flat.shape)
        return found


@lru_cache(maxsize=1024)
def drafting(speculation: Speculation, model: StepModel) -> Drafting:
    """Drafting on the engine of a step model."""
    if speculation.method == "ngram":
        return Drafting(model, speculation, 0.0, _host_s("look_up_us") if speculation.draft else 0.0)
    layers = speculation.layers(model.table)
    shape = replace(model.shape, pipeline_layers=(), pp=1, formats=())
    draft = StepModel(
        _draft_table(model.table, layers),
        shape,
        model.gpu,
        model.fabric,
        model.profile,
        costs=model.layers.costs,
    )
    batch = np.array([1.0, _WIDE])
    pieces = draft.pieces(StepLoad(batch, _CONTEXT))
    one, wide = pieces.device.sum(axis=0)
    slope = max(float(wide - one) / (_WIDE - 1), 0.0)
    passes = speculation.draft
    return Drafting(model, speculation, passes * (float(one) - slope + _host_s("pass_us")), passes * slope)


@cache
def _host_s(name: str) -> float:
    text = resources.files("planc.cost_model.data").joinpath("speculative.yaml").read_text(encoding="utf-8")
    return float(yaml.safe_load(text)[name]) * 1e-6


def _last(table: CostTable) -> LayerClass:
    """The class of the last layer."""
    return max((cls for cls in table.classes if cls.layers), key=lambda cls: max(cls.layers))


def _draft_table(table: CostTable, layers: int) -> CostTable:
    """So many layers of the last layer's class, between the model's own embedding and head."""
    last = _last(table)
    kept = {last.name, "embedding", "head"}
    classes = tuple(
        replace(cls, count=layers, layers=tuple(range(layers))) if cls.name == last.name else cls
        for cls in table.classes
        if cls.name in kept
    )
    rows = {
        phase: tuple(row for row in rows if row.layer_class in kept) for phase, rows in table.rows.items()
    }
    fusions = tuple(offer for offer in table.fusions if offer.layer_class in kept)
    model = replace(table.model, layers=layers)
    return replace(table, classes=classes, rows=rows, fusions=fusions, model=model)
