"""A bidirectional transformer encoder of the BERT kind, written with plain PyTorch modules.

planc inspect examples.modules.encoder:base
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Every token of [B, S, hidden] attends to every other."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(project(x)) for project in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.output(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each with a residual and a norm after it."""

    def __init__(self, hidden: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden, heads)
        self.attention_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.output_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Encoder(nn.Module):
    """Token ids [B, S] -> one vector per text [B, hidden], the mean over its tokens."""

    def __init__(self, vocab: int, hidden: int, layers: int, heads: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(positions, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads, 4 * hidden) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.positions(places))
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


def base() -> tuple[nn.Module, Tensor]:
    """The shape of BERT-base: 109 million parameters, on meta."""
    with torch.device("meta"):
        return Encoder(30522, 768, 12, 12, 512), torch.empty(2, 64, dtype=torch.long)


def large() -> tuple[nn.Module, Tensor]:
    """The shape of BERT-large: 334 million parameters, on meta."""
    with torch.device("meta"):
        return Encoder(30522, 1024, 24, 16, 512), torch.empty(2, 64, dtype=torch.long)


def tiny() -> tuple[nn.Module, Tensor]:
    """Small and with real weights, to run on any machine."""
    torch.manual_seed(0)
    return Encoder(97, 32, 3, 4, 64), torch.randint(97, (2, 12))
