"""Raising rotary embeddings: the module-level functions that apply them, and two kinds of tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planc.ir.ops.rotary import STYLES, rotate
from planc.ir.trace.raising import Raising, attempt, equal, modeling_files


def raise_rotary(raising: Raising, model: nn.Module) -> None:
    """`apply_rotary...` functions of the model's own files become `planc.rope` or `planc.rope_single`."""
    functions = [(f, *item) for f in modeling_files(model) for item in vars(f).items()]
    for modeling, name, function in functions:
        if not name.startswith("apply_rotary") or name.endswith("_vision") or not callable(function):
            continue
        parameters = list(inspect.signature(function).parameters)
        if parameters[:4] == ["q", "k", "cos", "sin"]:
            style = _style(partial(_first_of_pair, function))
            replacement = None if style is None else _pair(style)
        elif parameters[:3] == ["x", "cos", "sin"]:
            style = _style(partial(_of_single, function))
            replacement = None if style is None else _single(style)
        elif parameters == ["xq", "xk", "freqs_cis"]:
            style, replacement = _complex_style(function), _complex
        else:
            continue
        if style is None or replacement is None:
            raising.left.add(name)
            continue
        raising.set(modeling, name, replacement)
        if replacement is _complex:
            _raise_tables(raising, model, "freqs")
    if any(hasattr(module, "mrope_section") for module in model.modules()):
        _raise_tables(raising, model, "mrope")


def _first_of_pair(function: Any, x: Tensor, cos: Tensor, sin: Tensor, heads_dim: int) -> Any:
    return function(x, x, cos, sin, unsqueeze_dim=heads_dim)[0]


def _of_single(function: Any, x: Tensor, cos: Tensor, sin: Tensor, heads_dim: int) -> Any:
    return function(x, cos, sin, unsqueeze_dim=heads_dim)


def _style(apply: Callable[[Tensor, Tensor, Tensor, int], Any]) -> str | None:
    """The style of `planc.rope` that a function computes: all probes it accepts must agree."""
    head, probes = 8, []
    x = torch.randn(2, 3, 5, head, device="cpu")
    for heads_dim, tokens in ((1, 5), (2, 3)):
        for width in (head, head // 2):
            angles = torch.randn(2, tokens, width // 2, device="cpu")
            for table in (torch.cat([angles, angles], -1), torch.randn(2, tokens, width, device="cpu")):
                cos, sin = table.cos(), table.sin()
                given = attempt(partial(apply, x, cos, sin, heads_dim))
                if isinstance(given, Tensor):
                    probes.append((cos, sin, heads_dim, given))
    for style in STYLES:
        found = [attempt(partial(rotate, x, cos, sin, dim, style)) for cos, sin, dim, _ in probes]
        if probes and all(
            isinstance(f, Tensor) and equal(f, given) for f, (*_, given) in zip(found, probes, strict=True)
        ):
            return style
    return None


def _complex_style(function: Callable[..., Any]) -> str | None:
    """Llama 4's: complex tables [B, S, D / 2], heads in dimension 2."""
    x = torch.randn(2, 3, 5, 8, device="cpu")
    angles = torch.randn(2, 3, 4, device="cpu")
    given = attempt(lambda: function(x, x, torch.polar(torch.ones_like(angles), angles)))
    mine = rotate(x, angles.cos(), angles.sin(), 2, "pairs")
    return "pairs" if given is not None and equal(given[0], mine, 1e-5) else None


def _pair(style: str) -> Callable[..., Any]:
    def rope(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, unsqueeze_dim: int = 1, **__: Any
    ) -> Any:
        return torch.ops.planc.rope(q, k, cos, sin, unsqueeze_dim, style)

    return rope


def _single(style: str) -> Callable[..., Any]:
    def rope(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return torch.ops.planc.rope_single(x, cos, sin, unsqueeze_dim, style)

    return rope


class Tables(tuple[Tensor, Tensor]):
    """(cos, sin) where transformers expects one complex tensor; `.to(device)` is all it asks of it."""

    def to(self, _device: Any) -> Tables:
        return self


def _complex(xq: Tensor, xk: Tensor, freqs_cis: Tables) -> Any:
    cos, sin = freqs_cis
    return torch.ops.planc.rope(xq, xk, cos, sin, 2, "pairs")


def _raise_tables(raising: Raising, model: nn.Module, kind: str) -> None:
    """Tables of real numbers from text positions: for complex ones, and for three-axis (mrope) ones whose
    axes all count the same in text (Qwen2-VL, arXiv 2409.12191, section 2.1)."""
    for module in model.modules():
        if not hasattr(module, "inv_freq") or "RotaryEmbedding" not in type(module).__name__:
            continue

        def forward(x: Tensor, position_ids: Tensor, module: Any = module) -> tuple[Tensor, Tensor]:
            positions = position_ids[0] if position_ids.dim() == 3 else position_ids
            angles = positions[..., None].float() * module.inv_freq.float()
            if kind == "freqs":
                scale = module.attention_scaling
                return Tables((angles.cos() * scale, angles.sin() * scale))
            both = torch.cat((angles, angles), -1)
            cos, sin = both.cos() * module.attention_scaling, both.sin() * module.attention_scaling
            return cos.to(x.dtype), sin.to(x.dtype)

        raising.set(module, "forward", forward)
