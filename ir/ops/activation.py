"""`planc.gated_activation`: act(gate) * up, the middle of a gated MLP (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.work import Work

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}

#: Operations per element that an activation and the product are counted as.
FLOPS = 6.0


@torch.library.custom_op("planc::gated_activation", mutates_args=())
def gated_activation(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """gate, up [..., I] -> act(gate) * up [..., I]; `act`: one of ACTIVATIONS."""
    return ACTIVATIONS[act](gate) * up


@gated_activation.register_fake
def _(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _work(call: Call) -> Work:
    return Work(
        "elementwise",
        flops=call.out() * FLOPS,
        reads=call.elements("gate") + call.elements("up"),
        writes=call.out(),
    )


declare(
    OpDef(
        torch.ops.planc.gated_activation.default,
        work=_work,
        shards=(ShardRule("column", {"gate": -1, "up": -1}, (-1,)),),
        pointwise=True,
    )
)
