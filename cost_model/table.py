"""The cost table: everything the search needs to know of a model, without torch.

One row per distinct op of a layer class and phase. Written next to the cached trace, read by
the planner; JSON, canonical order. See `planc.ir.work` for the features rows are written in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from planc.ir.work import NONE, Amount, Work

if TYPE_CHECKING:  # tables are read without numpy
    from planc.cost_model.routing import ExpertLoad

Phase = Literal["prefill", "decode"]
ShardKind = Literal["replicated", "column", "row", "heads", "experts", "vocab"]


@dataclass(frozen=True, slots=True)
class Shard:
    """How a row is divided under tensor (or, for experts, expert) parallelism.

    kind        replicated: every rank does all of it. column: outputs divided. row: inputs
                divided, output a partial sum. heads: whole heads divided. experts: whole experts
                (EP) or each expert's width (TP). vocab: rows of the vocabulary.
    units       number of indivisible pieces. A degree must divide it; for KV heads a larger
                degree that is a multiple replicates instead.
    kv_units    the same for cache reads/writes (KV heads; 0: the cache is not divisible, e.g. MLA)
    collective  what follows the op: "all_reduce", "all_gather", or None
    moved       elements (full tensor, before division) that the collective works on
    """

    kind: ShardKind = "replicated"
    units: int = 0
    kv_units: int = 0
    collective: Literal["all_reduce", "all_gather"] | None = None
    moved: Amount = NONE


@dataclass(frozen=True, slots=True)
class Row:
    """One op of one layer class: `calls` of it per layer.

    quantizable   which operands may take another format: any of "weight", "activation", "kv"
    """

    layer_class: str
    site: str  # path inside the layer, e.g. "self_attn.q_proj"
    op: str  # e.g. "aten::linear", "planc::paged_attention"
    calls: int
    work: Work
    shard: Shard = field(default_factory=Shard)
    quantizable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FusionOffer:
    """A rewrite that a fusion pass can apply: what it saves per layer of `layer_class`, per step."""

    name: str  # e.g. "residual_add_rms_norm"
    layer_class: str
    sites: tuple[str, ...]
    launches: int
    reads: Amount = NONE
    writes: Amount = NONE


@dataclass(frozen=True, slots=True)
class LayerClass:
    """`count` structurally identical layers ("embedding" and "head" are classes of count 1).

    parameters       per layer
    kv_elements      cache elements per token per layer
    kv_span          how far the layer's attention reaches (a span as in planc.ir.work; "" if none)
    kv_units         KV heads (0: the cache cannot be divided by TP)
    state_elements   recurrent state elements per sequence per layer (fp32)
    """

    name: str
    count: int
    layers: tuple[int, ...]
    parameters: int
    kv_elements: int = 0
    kv_span: str = ""
    kv_units: int = 0
    state_elements: int = 0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of the traced model that no row holds."""

    name: str
    architecture: str  # e.g. "LlamaForCausalLM"; for plain modules the class name
    model_type: str  # e.g. "llama"; "" for plain modules
    kind: Literal["causal_lm", "encoder", "module"]
    parameters: int
    active_parameters: int  # parameters one token passes through (routed experts: top_k of them)
    native_format: str  # format of the published checkpoint: bf16, fp8, mxfp4, w4a16 ...
    hidden: int
    layers: int
    vocab: int
    max_position: int
    q_heads: int
    kv_heads: int
    experts: int = 0
    top_k: int = 0
    tied_embeddings: bool = False
    generic_ops: tuple[str, ...] = ()  # ATen ops that were costed generically, for coverage
    notes: tuple[str, ...] = ()  # what a user should know of how the model was traced
    block_scales: bool = False  # the checkpoint's fp8 weights have a scale per block, not per tensor


@dataclass(frozen=True, slots=True)
class CostTable:
    """All rows of both phases. Encoders and plain modules have the "prefill" phase only.

    expert_load   how often experts are chosen in the traffic that is planned for; not the model's, so it is
                  not written with it
    """

    model: ModelFacts
    fingerprint: str
    classes: tuple[LayerClass, ...]
    rows: Mapping[Phase, tuple[Row, ...]]
    fusions: tuple[FusionOffer, ...] = ()
    expert_load: ExpertLoad | None = None

    def kv_elements_per_token(self) -> int:
        return sum(c.count * c.kv_elements for c in self.classes)

    def to_json(self) -> str:
        written = {key: value for key, value in asdict(self).items() if key != "expert_load"}
        return json.dumps(written, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> CostTable:
        raw: dict[str, Any] = json.loads(text)
        return CostTable(
            model=_facts(raw["model"]),
            fingerprint=raw["fingerprint"],
            classes=tuple(LayerClass(**{**c, "layers": tuple(c["layers"])}) for c in raw["classes"]),
            rows={phase: tuple(_row(r) for r in rows) for phase, rows in raw["rows"].items()},
            fusions=tuple(_fusion(f) for f in raw["fusions"]),
        )


def _facts(raw: dict[str, Any]) -> ModelFacts:
    lists = {name: tuple(raw.get(name, ())) for name in ("generic_ops", "notes")}
    return ModelFacts(**{**raw, **lists})


_AMOUNTS = ("flops", "reads", "writes", "kv_reads", "kv_writes")


def _row(raw: dict[str, Any]) -> Row:
    work: dict[str, Any] = {k: Amount(v["terms"]) if k in _AMOUNTS else v for k, v in raw["work"].items()}
    shard: dict[str, Any] = {k: Amount(v["terms"]) if k == "moved" else v for k, v in raw["shard"].items()}
    return Row(
        **{
            **raw,
            "work": Work(**work),
            "shard": Shard(**shard),
            "quantizable": tuple(raw["quantizable"]),
        }
    )


def _fusion(raw: dict[str, Any]) -> FusionOffer:
    return FusionOffer(
        **{
            **raw,
            "sites": tuple(raw["sites"]),
            "reads": Amount(raw["reads"]["terms"]),
            "writes": Amount(raw["writes"]["terms"]),
        }
    )
