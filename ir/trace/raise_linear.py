"""Raising linear attention: the delta rule and the short convolution are functions of the model's file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planc.errors import TraceFailed
from planc.ir.trace.raising import Raising, attempt, equal, modeling_files

_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def raise_linear_attention(raising: Raising, model: nn.Module) -> None:
    for modeling in modeling_files(model):
        for name in _RULES:
            function = getattr(modeling, name, None)
            if function is not None:
                _replace(raising, modeling, name, _delta_rule, _same_rule(function))
        function = getattr(modeling, "causal_conv1d_fn", None)
        if function is not None:
            _replace(raising, modeling, "causal_conv1d_fn", _conv1d, _same_conv(function))


def _replace(raising: Raising, modeling: Any, name: str, op: Any, same: bool) -> None:
    if same:
        raising.set(modeling, name, op)
    else:
        raising.left.add(name)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    if initial_state is not None or output_final_state:
        raise TraceFailed(
            model="gated delta rule",
            reason="the forward being traced keeps a state",
            mend="Trace it without a cache; planc adds the state itself.",
        )
    return torch.ops.planc.gated_delta_rule(query, key, value, g, beta, use_qk_l2norm_in_kernel), None


def _conv1d(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Any:
    return torch.ops.planc.causal_conv1d(hidden_states, weight, bias, activation or "")


def _same_rule(function: Any) -> bool:
    shape = (1, 5, 2, 4)
    q, k, v = (torch.randn(shape, device="cpu") for _ in range(3))
    g, beta = -torch.rand(1, 5, 2, device="cpu"), torch.rand(1, 5, 2, device="cpu")
    for l2norm in (True, False):
        given = attempt(partial(function, q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=l2norm))
        mine = torch.ops.planc.gated_delta_rule(q, k, v, g, beta, l2norm)
        if not isinstance(given, tuple) or not equal(given[0], mine, 1e-4):
            return False
    return True


def _same_conv(function: Any) -> bool:
    x, weight, bias = (torch.randn(*s, device="cpu") for s in ((2, 6, 9), (6, 4), (6,)))
    for b, act in ((bias, "silu"), (None, None)):
        given = attempt(partial(function, x, weight, b, activation=act))
        mine = torch.ops.planc.causal_conv1d(x, weight, b, act or "")
        if not isinstance(given, Tensor) or not equal(given, mine, 1e-5):
            return False
    return True
