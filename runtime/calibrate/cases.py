"""What is measured: shapes of products, attention and memory traffic, per kind of device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from planc.cost_model.catalogue import Precision

Case = dict[str, Any]
Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Axes of the tables, and how each sample is taken.

    heads         (query heads, KV heads, width of a head)
    attention     precision that attention runs in
    widths        bytes per row, and rows, of pointwise kernels
    cold_mib      operands together larger than this come from memory, not from a cache
    slice_s       length of one sample; `samples` of them at least in each of `passes`
    """

    precisions: tuple[Precision, ...]
    rows: tuple[int, ...]
    n: tuple[int, ...]
    k: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]
    attention: Precision
    sequences: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    cached: tuple[int, ...]
    pointwise: tuple[tuple[int, int], ...]
    memory_mib: tuple[float, ...]
    messages: tuple[int, ...]
    cold_mib: float
    slice_s: float
    samples: int
    passes: int

    def cases(self) -> Iterator[Case]:
        """All of them; those of one weight follow each other, the cheapest to lose come last."""
        yield {"op": "launch"}
        for mib in self.memory_mib:
            yield {"op": "read", "mib": mib}
            yield {"op": "copy", "mib": mib}
        yield from self.attention_cases()
        for precision in self.precisions:
            for n in self.n:
                for k in self.k:
                    for m in self.rows:
                        yield {"op": "gemm", "m": m, "n": n, "k": k, "dtype": precision}
        for rows, width in self.pointwise:
            yield {"op": "pointwise", "rows": rows, "width": width, "dtype": self.attention}

    def attention_cases(self) -> Iterator[Case]:
        """Decode over (sequences, context), the new token included; prefill over (chunk, cached)."""
        for q_heads, kv_heads, dim in self.heads:
            shape = {"op": "attention", "q_heads": q_heads, "kv_heads": kv_heads, "dim": dim}
            shape["dtype"] = self.attention
            for sequences in self.sequences:
                for context in self.contexts:
                    yield {**shape, "sequences": sequences, "new": 1, "cached": context - 1}
            for new in self.chunks:
                for cached in self.cached:
                    yield {**shape, "sequences": 1, "new": new, "cached": cached}


_CPU = Grid(
    precisions=("bf16",),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    n=(512, 2048, 8192),
    k=(512, 1024, 4096),
    heads=((16, 4, 64), (4, 4, 64), (16, 4, 128)),
    attention="bf16",
    sequences=(1, 4, 16, 64),
    contexts=(16, 128, 512, 2048),
    chunks=(16, 64, 256, 1024),
    cached=(0, 256, 1024),
    pointwise=((1, 1024), (64, 1024), (1024, 1024), (4096, 2048)),
    memory_mib=(64, 256),
    messages=(4096, 65536, 1 << 20, 1 << 23),
    cold_mib=96,
    slice_s=0.02,
    samples=4,
    passes=3,
)
_CUDA = Grid(
    precisions=("bf16", "fp8", "int8"),
    rows=(1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    n=(1024, 2048, 4096, 8192, 16384, 32768),
    k=(1024, 2048, 4096, 8192, 16384),
    heads=((32, 8, 128), (8, 8, 128), (64, 8, 64)),
    attention="bf16",
    sequences=(1, 4, 16, 64, 256),
    contexts=(128, 1024, 4096, 16384),
    chunks=(128, 512, 2048, 8192),
    cached=(0, 2048, 8192),
    pointwise=((16, 4096), (256, 4096), (4096, 4096), (16384, 8192)),
    memory_mib=(256, 2048),
    messages=(4096, 65536, 1 << 20, 1 << 24, 1 << 28),
    cold_mib=256,
    slice_s=0.01,
    samples=9,
    passes=1,
)
_TINY = Grid(
    precisions=("bf16",),
    rows=(1, 16, 128),
    n=(256, 1024),
    k=(256, 1024),
    heads=((4, 2, 64),),
    attention="bf16",
    sequences=(1, 4),
    contexts=(16, 128),
    chunks=(16, 64),
    cached=(0, 64),
    pointwise=(),  # compiling takes longer than all the rest
    memory_mib=(16,),
    messages=(4096, 1 << 20),
    cold_mib=8,
    slice_s=0.002,
    samples=3,
    passes=1,
)


def grid(kind: Kind, quick: bool) -> Grid:
    """quick: a few small shapes in seconds, to try things out; the numbers are rough."""
    return _TINY if quick else {"cpu": _CPU, "cuda": _CUDA}[kind]


def described(cases: Sequence[Case]) -> str:
    """Counts by op, for messages."""
    ops = list(dict.fromkeys(case["op"] for case in cases))
    return ", ".join(f"{sum(case['op'] == op for case in cases)} {op}" for op in ops)
