"""Raising norms, gated MLPs, routers and the sparse-attention indexer, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planc.ir.ops import norms
from planc.ir.trace.raise_experts import activation_of
from planc.ir.trace.raising import Raising, attempt, equal, stand_in


def raise_modules(raising: Raising, model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module).__name__
        if "Norm" in kind and not list(module.children()):
            _raise_norm(raising, module)
        elif {"gate_proj", "up_proj", "down_proj"} <= set(module._modules):
            _raise_mlp(raising, module)
        elif "Router" in kind and "forward" not in vars(module):
            _raise_router(raising, module)
        elif kind.endswith("Indexer") and hasattr(module, "index_topk"):
            _raise_indexer(raising, module)


# -- norms ------------------------------------------------------------------------------


def _raise_norm(raising: Raising, norm: Any) -> None:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or isinstance(norm, nn.LayerNorm | nn.GroupNorm):
        return
    weight = getattr(norm, "weight", None)
    mode = raising.probe((type(norm), weight is None), lambda: _norm_mode(norm, eps))
    if mode is None:
        raising.left.add(type(norm).__name__)
    elif mode == "gated":
        raising.set(
            norm, "forward", lambda x, gate: torch.ops.planc.gated_rms_norm(x, gate, norm.weight, eps)
        )
    else:
        raising.set(
            norm,
            "forward",
            lambda x: torch.ops.planc.rms_norm(x, getattr(norm, "weight", None), eps, mode),
        )


def _norm_mode(norm: Any, eps: float) -> str | None:
    """The mode whose every bit the module's own forward gives in bf16, or "gated", or None."""
    x, gate = (torch.randn(7, 64, device="cpu").bfloat16() for _ in range(2))
    weight = torch.randn(64, device="cpu").bfloat16()
    bare = getattr(norm, "weight", None) is None
    twin = stand_in(norm) if bare else stand_in(norm, weight=weight)
    given = attempt(lambda: twin.forward(x))
    if isinstance(given, Tensor):
        for mode in ("none",) if bare else norms.MODES:
            if torch.equal(given, norms.rms_norm(x, None if bare else weight, eps, mode)):
                return mode
        return None
    given = attempt(lambda: twin.forward(x, gate))
    if isinstance(given, Tensor) and torch.equal(given, norms.gated_rms_norm(x, gate, weight, eps)):
        return "gated"
    return None


# -- gated MLPs --------------------------------------------------------------------------


class _Affine(nn.Module):
    """A stand-in for a projection."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def _raise_mlp(raising: Raising, mlp: Any) -> None:
    act = raising.probe(("mlp", type(mlp), type(_act_fn(mlp))), lambda: _mlp_activation(mlp))
    if act is None:
        raising.left.add(type(mlp).__name__)
        return

    def forward(x: Tensor) -> Any:
        return mlp.down_proj(torch.ops.planc.gated_activation(mlp.gate_proj(x), mlp.up_proj(x), act))

    raising.set(mlp, "forward", forward)


def _act_fn(mlp: Any) -> Any:
    return getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)


def _mlp_activation(mlp: Any) -> str | None:
    """The activation, if the module's forward is down(act(gate(x)) * up(x)) whatever its projections are."""
    function = _act_fn(mlp)
    act = activation_of(function) if function is not None else None
    if act is None:
        return None
    gate, up, down = _Affine(1.5, 0.1), _Affine(-0.7, 0.3), _Affine(2.0, -0.2)
    x = torch.randn(5, 8, device="cpu")
    given = attempt(lambda: stand_in(mlp, gate_proj=gate, up_proj=up, down_proj=down).forward(x))
    if not isinstance(given, Tensor):
        return None
    return act if equal(given, down(function(gate(x)) * up(x))) else None


# -- routers ------------------------------------------------------------------------------

Routing = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(logits [T, E], correction bias or expert scale [E]) -> weights, ids [T, k]."""


def _raise_router(raising: Raising, router: Any) -> None:
    """transformers' routers give (logits, weights, ids). Raised where one of the candidates agrees."""
    if hasattr(router, "per_expert_scale") and hasattr(router, "proj"):
        _raise_gemma_router(raising, router)
        return
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not hasattr(router, "top_k"):
        raising.left.add(type(router).__name__)
        return
    found = raising.probe(
        (type(router), tuple(weight.shape), router.top_k), lambda: _routing_of(router, weight.shape[0])
    )
    if found is None:
        raising.left.add(type(router).__name__)
        return
    routing, fp32 = found

    def forward(hidden: Tensor, given_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        flat = hidden.reshape(-1, router.weight.shape[1])
        logits = _logits(router, flat, fp32)
        bias = getattr(router, "e_score_correction_bias", given_bias)
        return (logits, *routing(logits, bias))

    raising.set(router, "forward", forward)


def _logits(router: Any, flat: Tensor, fp32: bool) -> Tensor:
    weight = router.weight
    if fp32:
        flat, weight = flat.float(), weight.float()
    return F.linear(flat, weight, getattr(router, "bias", None))


def _routing_of(router: Any, experts: int) -> tuple[Routing, bool] | None:
    """The routing op and whether logits are taken in fp32, by running the router on 16 features."""
    x, weight = torch.randn(9, 16, device="cpu"), torch.randn(experts, 16, device="cpu")
    bias = torch.randn(experts, device="cpu") * 0.1
    found, low = (_run_router(router, x.to(d), weight.to(d), bias) for d in (torch.float32, torch.bfloat16))
    if found is None or low is None:
        return None
    twin, corrected, (logits, weights, ids) = found
    fp32, cast = (t.dtype == dtype for t, dtype in zip(low[2], (torch.float32, torch.bfloat16), strict=False))
    if not equal(_logits(twin, x, fp32), logits, 1e-5):
        return None
    for candidate in _candidates(router, cast):
        mine = candidate(logits, bias if corrected else None)
        if equal(_dense(*mine, experts), _dense(weights, ids, experts), 1e-5):
            return candidate, fp32
    return None


def _run_router(router: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, bool, Any] | None:
    """A small twin of the router, whether it takes a correction bias, and (logits, weights, ids)."""
    changed: dict[str, Any] = {"weight": weight, "hidden_dim": x.shape[1]}
    if isinstance(getattr(router, "bias", None), Tensor):
        changed["bias"] = bias.to(x.dtype)
    corrected = hasattr(router, "e_score_correction_bias")
    if corrected:
        changed["e_score_correction_bias"] = bias
    twin = stand_in(router, **changed)
    given = attempt(partial(twin.forward, x))
    if given is None:  # MiniMax hands the bias in
        given, corrected = attempt(partial(twin.forward, x, bias)), True
    return (twin, corrected, given) if isinstance(given, tuple) and len(given) == 3 else None


def _candidates(router: Any, cast: bool) -> Iterator[Routing]:
    ops, k = torch.ops.planc, int(router.top_k)
    groups, top_groups = int(getattr(router, "num_group", 1)), int(getattr(router, "topk_group", 1))
    scaling = float(getattr(router, "routed_scaling_factor", 1.0))
    for normalize in (True, False):
        yield lambda x, _, n=normalize: ops.route_softmax(x, None, k, n, cast)  # type: ignore[misc]
        if not cast:
            yield lambda x, b, n=normalize: ops.route_grouped(x, b, k, groups, top_groups, n, scaling)  # type: ignore[misc]
    for score in ("softmax", "sigmoid"):
        yield lambda x, _, s=score: ops.route_topk(x, k, s, cast)  # type: ignore[misc]


def _dense(weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """[T, E] with each chosen expert's weight, so that the order of choices does not matter."""
    return torch.zeros(ids.shape[0], experts).scatter_(1, ids.long(), weights.float())


def _raise_gemma_router(raising: Raising, router: Any) -> None:
    """Gemma 4's: a norm and two scales before the logits, a scale per expert behind the weights."""
    top_k = int(router.config.top_k_experts)

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = router.norm(hidden) * router.scale * router.scalar_root_size
        logits = router.proj(scaled)
        weights, ids = torch.ops.planc.route_softmax(logits, router.per_expert_scale, top_k, True, False)
        return logits, weights, ids

    def agrees() -> bool:
        width, experts = 16, router.per_expert_scale.shape[0]
        proj = nn.Linear(width, experts, bias=False, device="cpu")
        scale, per_expert = torch.randn(width, device="cpu"), torch.randn(experts, device="cpu")
        twin = stand_in(router, proj=proj, scale=scale, per_expert_scale=per_expert)
        x = torch.randn(9, width, device="cpu")
        given = attempt(lambda: twin.forward(x))
        if given is None:
            return False
        logits = proj(twin.norm(x) * scale * router.scalar_root_size)
        weights, ids = torch.ops.planc.route_softmax(logits, per_expert, top_k, True, False)
        return equal(_dense(weights, ids, experts), _dense(given[1], given[2], experts), 1e-5)

    if raising.probe((type(router), top_k), agrees):
        raising.set(router, "forward", forward)
    else:
        raising.left.add(type(router).__name__)


# -- the sparse-attention indexer ------------------------------------------------------------


def _raise_indexer(raising: Raising, indexer: Any) -> None:
    """Its projections stay linears; scores and choice become `planc.dsa_indexer` (DeepSeek-V3.2, GLM-5)."""
    style = raising.probe(type(indexer), lambda: _indexer_style(indexer))
    if style is None:
        raising.left.add(type(indexer).__name__)
        return

    def forward(
        hidden_states: Tensor, q_resid: Tensor, position_embeddings: tuple[Tensor, Tensor], *_: Any, **__: Any
    ) -> Tensor:
        return _indexed(indexer, hidden_states, q_resid, position_embeddings, style)

    raising.set(indexer, "forward", forward)


def _indexed(
    indexer: Any, hidden: Tensor, q_resid: Tensor, tables: tuple[Tensor, Tensor], style: str
) -> Tensor:
    batch, tokens, _ = hidden.shape
    rope, rest = indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim
    q = indexer.wq_b(q_resid).view(batch, tokens, -1, indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
    q_rot, q_pass = torch.split(q, [rope, rest], -1)
    k_rot, k_pass = torch.split(k, [rope, rest], -1)
    q_rot, k_rot = torch.ops.planc.rope(q_rot, k_rot, *tables, 2, style)
    q, k = torch.cat([q_rot, q_pass], -1), torch.cat([k_rot, k_pass], -1).squeeze(2)
    weights = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float()
    weights = weights * indexer.n_heads**-0.5
    chosen = torch.ops.planc.dsa_indexer(q, k, weights, indexer.index_topk, indexer.softmax_scale)
    assert isinstance(chosen, Tensor)
    return chosen


def _indexer_style(indexer: Any) -> str | None:
    """The rotary style with which the op chooses the keys that the indexer's own forward chooses."""
    width, tokens = 8, 12

    def linear(n: int) -> nn.Linear:
        return nn.Linear(width, n, bias=False, device="cpu")

    twin = stand_in(
        indexer,
        wq_b=linear(indexer.n_heads * indexer.head_dim),
        wk=linear(indexer.head_dim),
        weights_proj=linear(indexer.n_heads),
        k_norm=nn.LayerNorm(indexer.head_dim, eps=indexer.k_norm.eps, device="cpu"),
        index_topk=4,
    )
    hidden, q_resid = torch.randn(1, tokens, width, device="cpu"), torch.randn(1, tokens, width, device="cpu")
    angles = torch.randn(1, tokens, indexer.qk_rope_head_dim // 2, device="cpu")
    tables = (torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin())
    causal = torch.ones(1, tokens, tokens, dtype=torch.bool, device="cpu").tril()
    given = attempt(lambda: twin.forward(hidden, q_resid, tables, causal, None))
    if not isinstance(given, Tensor):
        return None
    queries = torch.arange(tokens, device="cpu")[:, None]
    theirs = given.long().masked_fill(given > queries, -1).sort(-1)[0]
    for style in ("interleaved", "half"):
        mine = attempt(lambda s=style: _indexed(twin, hidden, q_resid, tables, s))  # type: ignore[misc]
        if isinstance(mine, Tensor) and torch.equal(mine.long().sort(-1)[0], theirs):
            return style
    return None
