"""Every kernel planc can write, as data: template, holes, and what the manifest says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ACTIVATIONS = ("bf16", "fp16", "fp32")
FP8 = "*fp8e4nv"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kernel: which template it is and what fills the holes.

    op          op of the dialect whose numbers it gives; with a store that quantises, of its
                dequantised result
    signature   of `kernel`, without the constexprs
    holes       what the template reads: the include of each hole, and flags
    """

    name: str
    op: str
    template: str
    title: str
    formula: str
    signature: Mapping[str, str]
    constexprs: tuple[str, ...]
    grid: str
    holes: Mapping[str, Any] = field(default_factory=dict)
    min_capability: int = 80


def _norm(residual: bool, fp8: bool) -> Kind:
    name = ("add_" if residual else "") + "rms_norm" + ("_fp8" if fp8 else "")
    added = "total = x + residual; " if residual else ""
    of = "total" if residual else "x"
    return Kind(
        name=name,
        op="planc::add_rms_norm" if residual else "planc::rms_norm",
        template="rms_norm.py.jinja",
        title=("Residual addition and RMS norm" if residual else "RMS norm")
        + (", stored as fp8 with one scale per token" if fp8 else ""),
        formula=f"{added}y = {of} / sqrt(mean({of}^2) + eps) * (weight + weight_offset)",
        signature={
            "x_ptr": "*T",
            **({"residual_ptr": "*T", "sum_ptr": "*T"} if residual else {}),
            "weight_ptr": "*T",
            "y_ptr": FP8 if fp8 else "*T",
            **({"scale_ptr": "*fp32"} if fp8 else {}),
            "rows": "i32",
            "n": "i32",
            "x_stride": "i32",
            "eps": "fp32",
            "weight_offset": "fp32",
        },
        constexprs=("ROWS", "BLOCK"),
        grid="cdiv(rows, ROWS)",
        holes={
            "residual": residual,
            "fp8": fp8,
            "load": "load_row_residual.jinja" if residual else "load_row.jinja",
            "store": "store_fp8_token.jinja" if fp8 else "store_cast.jinja",
        },
        min_capability=89 if fp8 else 80,
    )


_GATES = {
    "silu": ("SiLU", "gate * sigmoid(gate) * up"),
    "gelu": ("GELU", "gelu(gate) * up"),
    "gelu_tanh": ("GELU (tanh form)", "gelu(gate) * up"),
}


def _gated(activation: str, fp8: bool) -> Kind:
    title, formula = _GATES[activation]
    return Kind(
        name=f"{activation}_mul" + ("_fp8" if fp8 else ""),
        op=f"planc::{activation}_mul",
        template="gated.py.jinja",
        title=f"{title} of the gate, times up" + (", stored as fp8 with one scale per token" if fp8 else ""),
        formula=f"y = {formula}",
        signature={
            "x_ptr": "*T",
            "y_ptr": FP8 if fp8 else "*T",
            **({"scale_ptr": "*fp32"} if fp8 else {}),
            "rows": "i32",
            "n": "i32",
            "x_stride": "i32",
        },
        constexprs=("BLOCK",),
        grid="rows" if fp8 else "rows, cdiv(n, BLOCK)",
        holes={
            "fp8": fp8,
            "activation": f"{activation}.jinja",
            "store": "store_fp8_token.jinja" if fp8 else "store_cast.jinja",
        },
        min_capability=89 if fp8 else 80,
    )


def _rope_kv(qk_norm: bool) -> Kind:
    weights = {"q_weight_ptr": "*T", "k_weight_ptr": "*T"} if qk_norm else {}
    return Kind(
        name=("qk_norm_" if qk_norm else "") + "rope_kv",
        op="planc::rope_kv_write",
        template="rope_kv.py.jinja",
        title=("Per-head RMS norm of q and k, rotary" if qk_norm else "Rotary")
        + " embedding, and the write of k and v into the paged cache",
        formula=("After each head's own RMS norm, the" if qk_norm else "The")
        + " pair (a, b) becomes (a cos - b sin, b cos + a sin).",
        signature={
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*T"),
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "slots_ptr": "*i64",
            **weights,
            "out_ptr": "*T",
            "k_cache_ptr": "*C",
            "v_cache_ptr": "*C",
            **dict.fromkeys(("q_heads", "kv_heads"), "i32"),
            **dict.fromkeys(("q_stride", "k_stride", "v_stride", "cos_stride"), "i32"),
            **dict.fromkeys(("k_scale", "v_scale"), "fp32"),
            **({"eps": "fp32", "weight_offset": "fp32"} if qk_norm else {}),
        },
        constexprs=("HEAD_DIM", "ROTARY", "PAIRS_IN", "PAIRS_OUT", "HEADS", "PAIRS", "REST", "WIDTH"),
        grid="tokens, cdiv(q_heads, HEADS) + cdiv(kv_heads, HEADS)",
        holes={"qk_norm": qk_norm},
    )


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        *(_norm(residual, fp8) for residual in (False, True) for fp8 in (False, True)),
        *(_gated(activation, fp8) for activation in _GATES for fp8 in (False, True)),
        *(_rope_kv(qk_norm) for qk_norm in (False, True)),
    )
}
