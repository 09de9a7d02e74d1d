"""Small plain modules for front-end tests: written as users write them, none with planc's ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """RMSNorm, in each of the ways that models round it."""

    def __init__(self, width: int, mode: str = "cast_mul") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        match self.mode:
            case "cast_mul":
                return self.weight * normed.to(x.dtype)
            case "mul_cast":
                return (self.weight.float() * normed).to(x.dtype)
            case "one_plus":
                return (normed * (1.0 + self.weight.float())).type_as(x)
        return normed.to(x.dtype)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, width: int, act: str = "silu") -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        match self.act:
            case "silu":
                gate = F.silu(gate)
            case "swish":
                gate = gate * torch.sigmoid(gate)
            case "gelu":
                gate = F.gelu(gate)
            case "gelu_tanh":
                gate = F.gelu(gate, approximate="tanh")
            case "relu":
                gate = F.relu(gate)
        return self.down(self.up(x) * gate)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `how` says in which of the usual ways it is written."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, how: str = "repeat") -> None:
        super().__init__()
        self.heads, self.kv_heads, self.how = heads, kv_heads, how
        size = width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, size * kv_heads), nn.Linear(width, size * kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, -1).transpose(1, 2)
        cos, sin = angles(tokens, q.shape[-1], x)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        return self.o(self.mix(q, k, v).transpose(1, 2).reshape(batch, tokens, width))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, groups = q.shape[2], self.heads // self.kv_heads
        if self.how == "gqa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.how == "expand":
            k, v = (expanded(t, groups) for t in (k, v))
        else:
            k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        match self.how:
            case "both":
                return F.scaled_dot_product_attention(q, k, v, scale=0.25)
            case "mask" | "expand":
                keep = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
                return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
            case "written":
                scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
                lower = torch.tril(torch.ones(tokens, tokens, device=q.device))
                scores = scores.masked_fill(lower[None, None] == 0, float("-inf"))
                return scores.softmax(-1) @ v
            case "added":
                scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
                bar = torch.full((tokens, tokens), float("-inf"), device=q.device).triu(1)
                return torch.matmul(F.softmax(scores + bar.to(q.dtype), dim=-1), v)
            case "moved":
                keep = torch.ones(2 * tokens, 2 * tokens, dtype=torch.bool, device=q.device).tril()
                return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[tokens:, :tokens])
            case "window":
                keep = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril().triu(-3)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), over [B, S, width]."""

    def __init__(
        self, width: int = 32, mode: str = "cast_mul", how: str = "repeat", act: str = "silu"
    ) -> None:
        super().__init__()
        self.first, self.second = Norm(width, mode), nn.RMSNorm(width, eps=1e-6)
        self.attention, self.mlp = Attention(width, how=how), GatedMlp(width, act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


def angles(tokens: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, size] of the rotary angles."""
    steps = 1.0 / (10000.0 ** (torch.arange(0, size, 2, device=like.device) / size))
    turns = torch.arange(tokens, device=like.device)[:, None] * steps[None]
    wide = torch.cat((turns, turns), -1)
    return wide.cos().to(like.dtype), wide.sin().to(like.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over halves, x [B, H, S, D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def expanded(x: Tensor, groups: int) -> Tensor:
    """[B, H, S, D] -> [B, H * groups, S, D], as Hugging Face models repeat heads."""
    batch, heads, tokens, size = x.shape
    return (
        x[:, :, None].expand(batch, heads, groups, tokens, size).reshape(batch, heads * groups, tokens, size)
    )


# -- factories for the doors -------------------------------------------------------------


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)


def bare() -> nn.Module:
    return nn.Linear(4, 4)


def wrong() -> str:
    return "a string"


def failing() -> nn.Module:
    raise ValueError("no such checkpoint")


NUMBER = 7


class Remembering(nn.Module):
    """Will not run under a compiler, so torch.export refuses it; a symbolic trace does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("compiling this module is not supported")
        y = self.linear(x)
        self.last = y
        return y.relu()


class Deciding(nn.Module):
    """Branches on a value: neither door takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1
