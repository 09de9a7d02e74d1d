"""`planc.last_token`: the last token of each sequence of a step, the only rows that need logits."""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, declare
from planc.ir.work import Work


@torch.library.custom_op("planc::last_token", mutates_args=())
def last_token(x: Tensor, query_starts: Tensor) -> Tensor:
    """x [1, T, *rest], query_starts [S + 1] -> [1, S, *rest]."""
    return x[:, query_starts[1:].long() - 1]


@last_token.register_fake
def _fake(x: Tensor, query_starts: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], query_starts.shape[0] - 1, *x.shape[2:]))


def _work(call: Call) -> Work:
    return Work("gather", reads=call.out(), writes=call.out())


declare(OpDef(torch.ops.planc.last_token.default, work=_work))
