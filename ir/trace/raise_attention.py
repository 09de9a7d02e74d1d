"""Raising attention through transformers' `AttentionInterface`, and MLA's expansion of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from planc.errors import TraceFailed
from planc.ir.trace.raising import Raising

NAME = "planc"


def raise_attention(raising: Raising, model: nn.Module) -> None:
    """Every attention of the model calls `planc.attention`; DeepSeek's and GLM's also `mla_expand_kv`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **facts: Any) -> Any:
        return _attention(raising, module, q, k, v, **facts), None

    ALL_ATTENTION_FUNCTIONS[NAME] = attend  # the instance's own table, not the class's
    raising.stack.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, NAME)
    raising.set(model.config, "_attn_implementation_internal", NAME)
    for module in model.modules():
        if hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj"):
            raising.set(module, "expand_kv", _expand_kv(module))
        if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
            # Llama 4 counts positions along the row; the op must take them from position_ids
            raising.set(module, "attn_temperature_tuning", False)
            raising.set(module, "planc_temperature", True)


def _attention(
    raising: Raising,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **others: Any,
) -> Tensor:
    for name in ("position_bias", "head_mask", "cu_seq_lens_q"):
        if others.get(name) is not None:
            raise TraceFailed(
                model=type(module).__name__,
                reason=f"its attention passes '{name}', which planc.attention does not take",
                mend="Give the model as 'package.module:factory' to trace it as plain ATen.",
            )
    if getattr(module, "planc_temperature", False):
        assert raising.positions is not None
        q = _tempered(q, raising.positions, module.floor_scale, module.attn_scale)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = torch.ops.planc.attention(
        q,
        k,
        v,
        s_aux,
        indices,
        float(q.shape[-1] ** -0.5 if scaling is None else scaling),
        bool(causal),
        int(sliding_window or 0),
        _chunk(module),
        float(softcap or 0.0),
    )
    assert isinstance(out, Tensor)
    return out


def _chunk(module: Any) -> int:
    config, layer = module.config, getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or layer is None or kinds[layer] != "chunked_attention":
        return 0
    return int(config.attention_chunk_size or 0)


def _tempered(q: Tensor, positions: Tensor, floor_scale: float, attn_scale: float) -> Tensor:
    """Queries scaled up with their position (Nakanishi, arXiv 2501.19399): q [B, H, S, D]."""
    grown = torch.log1p(torch.floor((positions.float() + 1.0) / floor_scale)) * attn_scale + 1.0
    return (q * grown[:, None, :, None]).to(q.dtype)


def _expand_kv(module: Any) -> Any:
    def expand(c_kv: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        weight = module.kv_b_proj.weight
        k, v = torch.ops.planc.mla_expand_kv(c_kv, k_rot, weight, module.qk_nope_head_dim, module.v_head_dim)
        return k, v

    return expand
