"""Raising routed experts through transformers' `ExpertsInterface`, and Llama 4's own mixture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planc.ir.ops.activation import ACTIVATIONS
from planc.ir.ops.experts import gated
from planc.ir.trace.raising import Raising, attempt, equal

NAME = "planc"


def raise_experts(raising: Raising, model: nn.Module) -> None:
    """Experts modules call `planc.experts`; one with a gate unknown to the op keeps grouped products."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    gates: dict[Any, str | None] = {}  # probed before the trace: nothing real runs inside it

    def run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        act = gates[module]
        if act is None:
            return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return call_experts(module, hidden_states, top_k_index, top_k_weights, act)

    ALL_EXPERTS_FUNCTIONS[NAME] = run
    raising.stack.callback(ALL_EXPERTS_FUNCTIONS.__delitem__, NAME)
    raising.set(model.config, "_experts_implementation_internal", NAME)
    for module in model.modules():
        if type(module).__name__ == "Llama4TextMoe":
            _raise_llama4(raising, module)
        elif hasattr(module, "_apply_gate"):
            key = (type(module), getattr(module, "alpha", None), getattr(module, "limit", None))
            gates[module] = raising.probe(key, partial(_gate_of, module))
            if gates[module] is None:
                raising.left.add(type(module).__name__)


def call_experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor, act: str) -> Tensor:
    """`planc.experts` on the stacked parameters of a transformers experts module."""
    out = torch.ops.planc.experts(
        x,
        ids,
        weights,
        module.gate_up_proj,
        getattr(module, "gate_up_proj_bias", None),
        module.down_proj,
        getattr(module, "down_proj_bias", None),
        act,
        bool(module.is_transposed),
        not module.is_concatenated,
        float(getattr(module, "alpha", 0.0)),
        float(getattr(module, "limit", 0.0)),
        False,
    )
    assert isinstance(out, Tensor)
    return out


def _gate_of(module: Any) -> str | None:
    """Which gate of `planc.experts` the module's own `_apply_gate` is, by running it."""
    if not module.has_gate or module.has_post_expert_norm:
        return None
    x = torch.randn(5, 16, device="cpu") * 3
    given = attempt(lambda: module._apply_gate(x))
    if not isinstance(given, Tensor):
        return None
    gate, up = x.chunk(2, -1) if module.is_concatenated else (x[..., ::2], x[..., 1::2])
    alpha, limit = float(getattr(module, "alpha", 0.0)), float(getattr(module, "limit", 0.0))
    return next(
        (name for name in (*ACTIVATIONS, "swigluoai") if equal(gated(gate, up, name, alpha, limit), given)),
        None,
    )


def _raise_llama4(raising: Raising, moe: Any) -> None:
    """Llama 4 runs every expert, on zeros where it was not chosen; the op runs the chosen ones only."""

    def route(flat: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(flat, moe.router.weight)
        weights, ids = torch.ops.planc.route_topk(logits, moe.top_k, "sigmoid", True)
        return weights, ids

    def run(flat: Tensor, weights: Tensor, ids: Tensor) -> Any:
        gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
        return torch.ops.planc.experts(
            flat, ids, weights, gate_up, None, down, None, act, True, False, 0.0, 0.0, True
        )

    def forward(hidden_states: Tensor) -> tuple[Tensor, None]:
        flat = hidden_states.reshape(-1, moe.hidden_dim)
        weights, ids = moe.router(flat)
        return moe.shared_expert(flat) + moe.experts(flat, weights, ids), None

    act = raising.probe(("act", type(moe)), lambda: activation_of(moe.experts.act_fn))
    if act is None:
        raising.left.add(type(moe).__name__)
        return
    raising.set(moe.router, "forward", route)
    raising.set(moe.experts, "forward", run)
    raising.set(moe, "forward", forward)


def activation_of(act_fn: Callable[[Tensor], Tensor]) -> str | None:
    """The name in ACTIVATIONS of a function, by running it."""
    x = torch.randn(64, device="cpu") * 3
    given = attempt(lambda: act_fn(x))
    if not isinstance(given, Tensor):
        return None
    return next((name for name, known in ACTIVATIONS.items() if equal(known(x), given)), None)
