"""Micro-benchmarks, in a process of their own: cases in on stdin, one JSON line per case and pass out.

    python worker.py < {"device": "cpu", "engine": "torch", "threads": 1, "cases": [{"op": "gemm", ...}]}

The file imports nothing of planc, so that any environment with torch can run it, an engine's own among
them: with `engine` "vllm" the kernels are those that vLLM calls on a CPU (oneDNN products on packed
weights, its paged attention). On a CUDA device the calls are captured in a graph and timed by events.

All cases are measured in each of `passes`, minutes apart, and the fastest pass counts: what else runs on the
machine only ever adds to a time. An answer is that of the passes so far.

Operands that a model would find in memory rather than in a cache (weights, the KV cache) take turns:
copies of them, together larger than `cold_mib`, are used one after another.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import cycle
from typing import Any

import torch

Case = dict[str, Any]
Call = Callable[[], object]
Product = Callable[[torch.Tensor], object]

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_MOST_COPIES = 2048


class Bench:
    """How long calls take on one device.

    clock       seconds: time of this thread alone where one thread works on a CPU, so that what others run
                on the machine counts as little as it can; wall time otherwise
    slice_s     one sample is as many calls as fill this long
    samples     at least so many samples, and more until their median is known to `precision`
    """

    def __init__(self, device: str, threads: int, cold_mib: float, slice_s: float, samples: int) -> None:
        self.device, self.cold_bytes = device, cold_mib * 2**20
        self.slice_s, self.samples, self.precision = slice_s, samples, 0.01
        self.clock = time.thread_time if device == "cpu" and threads == 1 else time.perf_counter

    def copies(self, nbytes: float) -> int:
        """Copies of an operand that together do not fit the caches."""
        return max(1, min(_MOST_COPIES, math.ceil(self.cold_bytes / max(nbytes, 1.0))))

    def seconds(self, calls: Sequence[Call]) -> tuple[float, float, int]:
        """(median seconds of one call, half the interquartile range over it, samples)."""
        run = self._graph(calls) if self.device == "cuda" else self._loop(calls)
        run(len(calls))  # warm-up: every operand once, code compiled, caches in their usual state
        once = max(run(1), 1e-9)
        inner = max(1, math.ceil(self.slice_s / once))
        found: list[float] = []
        while len(found) < 8 * self.samples:
            found.append(run(inner))
            if len(found) >= self.samples and self._spread(found) / math.sqrt(len(found)) < self.precision:
                break
        return statistics.median(found), self._spread(found), len(found)

    @staticmethod
    def _spread(samples: Sequence[float]) -> float:
        if len(samples) < 4:
            return 0.0
        low, middle, high = statistics.quantiles(samples, n=4)
        return (high - low) / 2 / middle

    def _loop(self, calls: Sequence[Call]) -> Callable[[int], float]:
        turn = cycle(calls)

        def run(count: int) -> float:
            start = self.clock()
            for _ in range(count):
                next(turn)()
            return (self.clock() - start) / count

        return run

    def _graph(self, calls: Sequence[Call]) -> Callable[[int], float]:
        """One replay runs every call once; the time is that of the device."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run(count: int) -> float:
            replays = max(1, math.ceil(count / len(calls)))
            first.record()
            for _ in range(replays):
                graph.replay()
            last.record()
            torch.cuda.synchronize()
            return float(first.elapsed_time(last)) * 1e-3 / (replays * len(calls))

        return run


# -- operands and calls --------------------------------------------------------------------


def gemm(case: Case, bench: Bench, engine: str) -> list[Call]:
    """[m, k] @ [k, n]; weights cold."""
    products = _products(case["n"], case["k"], case["dtype"], bench, engine)
    x = _random((case["m"], case["k"]), DTYPES[case["dtype"]], bench.device)
    return [partial(product, x) for product in products]


@lru_cache(maxsize=1)  # cases of one weight follow each other
def _products(n: int, k: int, precision: str, bench: Bench, engine: str) -> list[Product]:
    """The same product with different weights, as the engine multiplies."""
    dtype = DTYPES[precision]
    weights = [_random((n, k), dtype, bench.device) for _ in range(bench.copies(n * k * dtype.itemsize))]
    if precision == "int8":
        return [partial(_int8, w.t()) for w in weights]
    if precision == "fp8":
        return [partial(_fp8, w.t(), torch.ones((), device=bench.device)) for w in weights]
    if engine == "vllm" and bench.device == "cpu":
        from vllm import _custom_ops as ops

        if ops._supports_onednn:
            return [partial(_onednn, ops.onednn_mm, ops.create_onednn_mm(w.t(), 32)) for w in weights]
    return [partial(_linear, w) for w in weights]


def _linear(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, w)


def _int8(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(x, w)


def _fp8(w: torch.Tensor, one: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _onednn(multiply: Any, handler: Any, x: torch.Tensor) -> object:
    return multiply(handler, x, None)


def attention(case: Case, bench: Bench, engine: str) -> list[Call]:
    """`sequences` of them, each with `new` queries after `cached` tokens; the cache cold.

    decode: new = 1. Grouped-query heads as given.
    """
    if engine == "vllm" and bench.device == "cpu":
        return _vllm_attention(case, bench)
    dtype, device = DTYPES[case["dtype"]], bench.device
    sequences, new, total = case["sequences"], case["new"], case["new"] + case["cached"]
    heads, kv_heads, dim = case["q_heads"], case["kv_heads"], case["dim"]
    count = bench.copies(2 * sequences * kv_heads * total * dim * dtype.itemsize)
    q = _random((sequences, heads, new, dim), dtype, device)
    keys = [_random((sequences, kv_heads, total, dim), dtype, device) for _ in range(2 * count)]
    options: dict[str, Any] = {"enable_gqa": heads != kv_heads, "is_causal": new > 1 and total == new}
    if new > 1 and total > new:
        from torch.nn.attention.bias import causal_lower_right

        plain = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
        options["attn_mask"] = plain if device == "cpu" else causal_lower_right(new, total)
    attend = torch.nn.functional.scaled_dot_product_attention
    return [partial(attend, q, k, v, **options) for k, v in zip(keys[::2], keys[1::2], strict=True)]


def _vllm_attention(case: Case, bench: Bench) -> list[Call]:
    """vLLM's CPU kernels: write new keys and values into the paged cache, then attend."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype, block = DTYPES[case["dtype"]], case.get("block_size", 32)
    sequences, new, total = case["sequences"], case["new"], case["new"] + case["cached"]
    heads, kv_heads, dim = case["q_heads"], case["kv_heads"], case["dim"]
    isa = _get_attn_isa(dtype, block, dim, "auto")
    each = math.ceil(total / block)
    used = sequences * each
    count = bench.copies(2 * used * block * kv_heads * dim * dtype.itemsize)
    cache = _random((count * used, kv_heads, 2 * block, dim), dtype, "cpu")
    keys, values = cache.chunk(2, dim=2)
    order = torch.randperm(count * used).to(torch.int32).view(count, sequences, each)
    q = _random((sequences * new, heads, dim), dtype, "cpu")
    kv = _random((sequences * new, kv_heads, dim), dtype, "cpu")
    out = torch.empty_like(q)
    starts = torch.arange(0, (sequences + 1) * new, new, dtype=torch.int32)
    lengths = torch.full((sequences,), total, dtype=torch.int32)
    meta = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=sequences,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    places = torch.arange(case["cached"], total)
    tables = [table.contiguous() for table in order]
    slots = [(table[:, places // block].long() * block + places % block).reshape(-1) for table in tables]

    def attend(table: torch.Tensor, slots: torch.Tensor) -> None:
        ops.cpu_attn_reshape_and_cache(kv, kv, keys, values, slots, isa)
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=dim**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=meta,
            s_aux=None,
        )

    return [partial(attend, table, places) for table, places in zip(tables, slots, strict=True)]


def pointwise(case: Case, bench: Bench, engine: str) -> list[Call]:
    """A compiled RMS norm of [rows, width]: reads and writes each element once."""
    dtype = DTYPES[case["dtype"]]
    x = _random((case["rows"], case["width"]), dtype, bench.device)
    scale = _random((case["width"],), dtype, bench.device)

    def norm(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype) * scale

    return [partial(torch.compile(norm, dynamic=True), x)]


def read(case: Case, bench: Bench, engine: str) -> list[Call]:
    """Memory read once and summed: what streaming weights can reach at best."""
    size = int(case["mib"] * 2**20)
    parts = [torch.ones(size // 4, device=bench.device) for _ in range(bench.copies(size))]
    return [x.sum for x in parts]


def copy(case: Case, bench: Bench, engine: str) -> list[Call]:
    """One block of memory to another; from pinned host memory to the device with `host`."""
    size = int(case["mib"] * 2**20)
    home = "cpu" if case.get("host") else bench.device
    pinned = bool(case.get("host")) and bench.device == "cuda"
    source = torch.ones(size, dtype=torch.uint8, device=home, pin_memory=pinned)
    target = torch.empty(size, dtype=torch.uint8, device=bench.device)
    return [partial(target.copy_, source, non_blocking=True)]


def _random(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random on a GPU, whose clock depends on the data; on a CPU rows repeat, which is faster to make."""
    if device == "cpu" and len(shape) > 1 and dtype != torch.int8:
        return _random(shape[-1:], dtype, device).expand(*shape).clone(memory_format=torch.contiguous_format)
    if dtype == torch.int8:
        return torch.randint(-127, 127, tuple(shape), dtype=dtype, device=device)
    return (torch.randn(tuple(shape), device=device) * 0.1).to(dtype)


def launch(device: str, calls: int = 2000) -> float:
    """Host seconds of issuing one small kernel that is not waited for (on a CPU: of one small op)."""
    x = torch.zeros(1, device=device)
    clock = time.thread_time if device == "cpu" else time.perf_counter
    found = []
    for _ in range(7):
        start = clock()
        for _ in range(calls):
            x.add_(1.0)
        found.append((clock() - start) / calls)
        if device == "cuda":
            torch.cuda.synchronize()
    return statistics.median(found)


OPS: dict[str, Callable[[Case, Bench, str], list[Call]]] = {
    "gemm": gemm,
    "attention": attention,
    "pointwise": pointwise,
    "read": read,
    "copy": copy,
}


def measured(case: Case, bench: Bench, engine: str) -> dict[str, Any]:
    """A case's seconds, or why it could not be measured (no such kernel, not enough memory)."""
    try:
        if case["op"] == "launch":
            return {"seconds": launch(bench.device), "spread": 0.0, "samples": 7}
        with torch.inference_mode():
            median, spread, samples = bench.seconds(OPS[case["op"]](case, bench, engine))
    except (RuntimeError, ImportError, NotImplementedError, AttributeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return {"seconds": median, "spread": spread, "samples": samples}


def facts(device: str) -> dict[str, Any]:
    """What the device says of itself, and versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": device}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {
            "name": card.name,
            "memory_gib": card.total_memory / 2**30,
            "sm_count": card.multi_processor_count,
            "cuda": torch.version.cuda or "",
        }
        if hasattr(card, "L2_cache_size"):
            found["l2_mib"] = card.L2_cache_size / 2**20
    return found


def main() -> None:
    asked = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    bench = Bench(asked["device"], asked["threads"], asked["cold_mib"], asked["slice_s"], asked["samples"])
    engine = asked["engine"]
    about = facts(bench.device)
    if engine == "vllm":
        import vllm
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        about["vllm"] = vllm.__version__
    print(json.dumps({"facts": about}), file=out, flush=True)
    end = time.monotonic() + asked["budget_s"]
    best: dict[int, dict[str, Any]] = {}
    for turn in range(asked["passes"]):
        for number, case in enumerate(asked["cases"]):
            late = time.monotonic() > end
            answer = {"error": "the time budget was spent"} if late else measured(case, bench, engine)
            known = best.get(number, answer)
            if answer.get("seconds", math.inf) <= known.get("seconds", math.inf):
                best[number] = answer
            print(json.dumps({"case": number, "pass": turn, **best[number]}), file=out, flush=True)


if __name__ == "__main__":
    main()
