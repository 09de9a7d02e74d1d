"""Inputs and float64 references for every kernel: what a check runs and a benchmark times.

A case holds the arguments of the kernel file's `launch`; `expected` computes in float64 on the same
inputs, written independently of the templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planc.codegen.triton.kinds import Kind

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max

#: Sizes to check at where the model's are not known.
COMMON_SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "rms_norm.py.jinja": ({"n": 4096},),
    "gated.py.jinja": ({"n": 14336},),
    "rope_kv.py.jinja": ({"head_dim": 128, "rotary": 128}, {"head_dim": 128, "rotary": 64}),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of `launch`, the tensors it must give, and the bytes it must move at least.

    observe   takes what `launch` returned; gives the tensors to compare, dequantised
    eager     the same in plain PyTorch, for timing against
    """

    arguments: dict[str, Any]
    expected: tuple[torch.Tensor, ...]
    observe: Callable[[Any], tuple[torch.Tensor, ...]]
    eager: Callable[[], Any]
    moved_bytes: int
    fp8: tuple[bool, ...]


def case(
    kind: Kind,
    size: Mapping[str, Any],
    *,
    rows: int,
    dtype: str,
    seed: int,
    device: str = "cpu",
    heads: int = 8,
) -> Case:
    """Fresh random inputs for one kernel. rows: tokens. heads: q heads (a quarter as many kv heads)."""
    draw = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device=device, dtype=DTYPES[dtype])

    match kind.template:
        case "rms_norm.py.jinja":
            return _norm(kind, normal, rows, size["n"])
        case "gated.py.jinja":
            return _gated(kind, normal, rows, size["n"])
        case _:
            return _rope_kv(kind, normal, rows, heads, size)


Normal = Callable[..., torch.Tensor]


def _norm(kind: Kind, normal: Normal, rows: int, n: int) -> Case:
    residual, fp8 = bool(kind.holes["residual"]), bool(kind.holes["fp8"])
    x, weight, eps, offset = 1.5 * normal(rows, n), 0.2 * normal(n), 1e-5, 1.0
    more = {"residual": normal(rows, n)} if residual else {}
    added = x.double() + more["residual"].double() if residual else x.double()
    y = added * torch.rsqrt(added.square().mean(-1, keepdim=True) + eps) * (weight.double() + offset)

    def eager() -> Any:
        total = x + more["residual"] if residual else x
        normed = torch.nn.functional.rms_norm(total, (n,), weight + offset, eps)
        return (*_eager_fp8(normed), total) if fp8 else (normed, total)

    def observe(found: Any) -> tuple[torch.Tensor, ...]:
        flat = found if isinstance(found, tuple) else (found,)
        head = (_dequantised(flat[0], flat[1]),) if fp8 else (flat[0],)
        return head + ((flat[-1],) if residual else ())

    tensors = [x, weight, *more.values()]
    out = rows * n * (1 if fp8 else x.element_size()) + (rows * n * x.element_size() if residual else 0)
    return Case(
        arguments={"x": x, **more, "weight": weight, "eps": eps, "weight_offset": offset},
        expected=(y, added) if residual else (y,),
        observe=observe,
        eager=eager,
        moved_bytes=sum(t.numel() * t.element_size() for t in tensors) + out,
        fp8=(fp8, False) if residual else (fp8,),
    )


def _gated(kind: Kind, normal: Normal, rows: int, n: int) -> Case:
    fp8 = bool(kind.holes["fp8"])
    x = 1.5 * normal(rows, 2 * n)
    gate, up = x.double().chunk(2, dim=-1)
    act = _ACTIVATIONS[str(kind.holes["activation"])]

    def eager() -> Any:
        y = act(x[:, :n]) * x[:, n:]
        return _eager_fp8(y) if fp8 else y

    return Case(
        arguments={"x": x},
        expected=(act(gate) * up,),
        observe=lambda found: (_dequantised(*found),) if fp8 else (found,),
        eager=eager,
        moved_bytes=x.numel() * x.element_size() + rows * n * (1 if fp8 else x.element_size()),
        fp8=(fp8,),
    )


def _rope_kv(kind: Kind, normal: Normal, rows: int, heads: int, size: Mapping[str, Any]) -> Case:
    head_dim, rotary, style = int(size["head_dim"]), int(size["rotary"]), str(size.get("style", "half"))
    pairs_in = style in ("pairs", "interleaved")
    kv_heads, block = max(1, heads // 4), 16
    packed = normal(rows, heads + 2 * kv_heads, head_dim)  # as a merged projection leaves them: not dense
    q, k, v = packed[:, :heads], packed[:, heads:-kv_heads], packed[:, -kv_heads:]
    device = q.device
    angle = normal(rows, rotary // 2).float() * 3
    cos, sin = angle.cos(), angle.sin()
    blocks = rows // block + 2
    slots = torch.arange(rows, device=device).flip(0) + block  # distinct, in no convenient order
    slots[rows // 2] = -1  # a padding token
    caches = [normal(blocks, block, kv_heads, head_dim) for _ in range(2)]
    q_weight, k_weight, eps = 1 + 0.2 * normal(head_dim), 1 + 0.2 * normal(head_dim), 1e-6
    qk_norm = bool(kind.holes["qk_norm"])
    more = {"q_weight": q_weight, "k_weight": k_weight, "eps": eps, "weight_offset": 0.25} if qk_norm else {}

    def rotated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if qk_norm:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.to(x.dtype) + 0.25)
        c, s = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
        turning, rest = x[..., :rotary], x[..., rotary:]
        a, b = (turning[..., 0::2], turning[..., 1::2]) if pairs_in else turning.chunk(2, dim=-1)
        a, b = a * c - b * s, b * c + a * s
        turned = torch.stack([a, b], -1).flatten(-2) if style == "pairs" else torch.cat([a, b], -1)
        return torch.cat([turned, rest], -1)

    kept = slots >= 0

    def written(cache: torch.Tensor, rows_in: torch.Tensor) -> torch.Tensor:
        flat = cache.flatten(0, 1).clone()
        flat[slots[kept]] = rows_in[kept]
        return flat.view(cache.shape)

    expected = (
        rotated(q.double(), q_weight),
        written(caches[0].double(), rotated(k.double(), k_weight) / 0.5),
        written(caches[1].double(), v.double() / 2.0),
    )

    def eager() -> Any:
        out = rotated(q, q_weight)
        at = slots[kept]
        caches[0].flatten(0, 1).index_copy_(0, at, (rotated(k, k_weight)[kept] / 0.5).to(caches[0].dtype))
        caches[1].flatten(0, 1).index_copy_(0, at, v[kept] / 2.0)
        return out

    size_of = q.element_size()
    return Case(
        arguments={
            "q": q,
            "k": k,
            "v": v,
            "cos": cos,
            "sin": sin,
            "slots": slots,
            "k_cache": caches[0],
            "v_cache": caches[1],
            "rotary": rotary,
            **more,
            "style": style,
            "k_scale": 0.5,
            "v_scale": 2.0,
        },
        expected=expected,
        observe=lambda found: (found, caches[0], caches[1]),
        eager=eager,
        moved_bytes=2 * packed.numel() * size_of + 2 * cos.numel() * 4 + 8 * rows,
        fp8=(False, False, False),
    )


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu.jinja": torch.nn.functional.silu,
    "gelu.jinja": torch.nn.functional.gelu,
    "gelu_tanh.jinja": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def _dequantised(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return y.float() * scale[:, None]


def _eager_fp8(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = y.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_LARGEST
    return (y.float() / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn), scale[:, 0]


#: Largest relative error of one output by its dtype: half a unit in the last place, and the float32
#: arithmetic before the cast.
ARITHMETIC = 2e-6
UNIT = {
    torch.float32: ARITHMETIC,
    torch.float16: 2.0**-11 + ARITHMETIC,
    torch.bfloat16: 2.0**-8 + ARITHMETIC,
}
FP8_UNIT, FP8_DENORMAL_STEP = 2.0**-4 + ARITHMETIC, 2.0**-9


def mismatch(found: torch.Tensor, expected: torch.Tensor, *, fp8: bool) -> float:
    """Largest error of an output as a multiple of what rounding to its format allows; up to 1 is right.

    Sums that cancel are allowed 1e-6 of the largest value; fp8 also half a step of its denormals.
    """
    floor = expected.abs().amax().clamp(min=1e-30) * 1e-6
    if fp8:
        floor = floor + expected.abs().amax(-1, keepdim=True) / FP8_LARGEST * FP8_DENORMAL_STEP / 2
    unit = FP8_UNIT if fp8 else UNIT[found.dtype]
    worst = ((found.double() - expected).abs() / (unit * expected.abs() + floor)).amax()
    return float("inf") if torch.isnan(worst) else float(worst)
