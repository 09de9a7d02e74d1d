"""`planc.mla_expand_kv`: keys and values out of the compressed latent (DeepSeek-V2, arXiv 2405.04434).

In a traced graph it stands before `planc.attention`. The phases pass takes the two together as
`planc.paged_mla`, which caches the latent instead of keys and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.work import Work


@torch.library.custom_op("planc::mla_expand_kv", mutates_args=())
def mla_expand_kv(
    c_kv: Tensor, k_rot: Tensor, kv_b: Tensor, nope_dim: int, v_dim: int
) -> tuple[Tensor, Tensor]:
    """c_kv [B, 1, S, R], k_rot [B, 1, S, Dr], kv_b [H (Dn + Dv), R] -> k [B, H, S, Dn + Dr], v [B, H, S, Dv].

    Each row block of kv_b is one head: Dn rows of its key, then Dv rows of its value. The rotary
    part of the key is shared by all heads.
    """
    batch, _, tokens, _ = c_kv.shape
    kv = F.linear(c_kv, kv_b).view(batch, tokens, -1, nope_dim + v_dim).transpose(1, 2)
    k_nope, v = torch.split(kv, [nope_dim, v_dim], -1)
    return torch.cat([k_nope, k_rot.expand(-1, kv.shape[1], -1, -1)], -1), v.contiguous()


@mla_expand_kv.register_fake
def _(c_kv: Tensor, k_rot: Tensor, kv_b: Tensor, nope_dim: int, v_dim: int) -> tuple[Tensor, Tensor]:
    heads = kv_b.shape[0] // (nope_dim + v_dim)
    leading = (c_kv.shape[0], heads, c_kv.shape[2])
    return c_kv.new_empty((*leading, nope_dim + k_rot.shape[3])), c_kv.new_empty((*leading, v_dim))


def _work(call: Call) -> Work:
    rank, width = call.size("kv_b", 1), call.size("kv_b", 0)
    return Work(
        "gemm",
        flops=call.elements("c_kv") * (2.0 * width),
        weights=rank * width,
        reads=call.elements("c_kv") + call.elements("k_rot"),
        writes=call.out(0) + call.out(1),
        dims={"k": rank, "n": width},
    )


declare(
    OpDef(
        torch.ops.planc.mla_expand_kv.default,
        work=_work,
        shards=(ShardRule("heads", {"kv_b": 0}, (1, 1)),),
        quantizable={"kv_b": "weight"},
    )
)
