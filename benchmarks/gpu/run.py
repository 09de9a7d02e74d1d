"""Checks and times every kernel planc can write, on the GPU of this machine.

    python benchmarks/gpu/run.py [--out results.json] [--rows 1 64 4096] [--kernel add_rms_norm ...]

For each kernel, size and number of tokens: outputs against the float64 reference on fresh random inputs,
then medians (triton.testing.do_bench, caches flushed between runs) of the kernel, of the same in eager
PyTorch and of torch.compile. Achieved bandwidth counts each operand once. Exit codes: 0 all right,
1 a kernel's numbers are wrong, 4 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from planc.codegen.triton import cases
from planc.codegen.triton.kinds import KINDS, Kind
from planc.codegen.triton.module import loaded
from planc.codegen.triton.render import render

#: Widths of the catalogue's models: Llama 8B, 70B, 405B; per-rank gated widths; heads.
SIZES: dict[str, tuple[dict[str, Any], ...]] = {
    "rms_norm.py.jinja": ({"n": 4096}, {"n": 8192}, {"n": 16384}),
    "gated.py.jinja": ({"n": 3584}, {"n": 14336}, {"n": 28672}),
    "rope_kv.py.jinja": ({"head_dim": 128, "rotary": 128}, {"head_dim": 128, "rotary": 64}),
}
HEADS = 64


@dataclass(frozen=True, slots=True)
class Timing:
    """One kernel at one size. Times are medians in microseconds; gb_s is the kernel's own bandwidth."""

    kernel: str
    dtype: str
    size: dict[str, Any]
    rows: int
    error: float
    kernel_us: float
    eager_us: float
    compiled_us: float
    gb_s: float

    @property
    def right(self) -> bool:
        return self.error <= 1.0


def time_us(call: Callable[[], Any]) -> float:
    """Median of a call in microseconds."""
    return 1e3 * float(triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median"))


def timings(kind: Kind, rows: list[int], dtype: str, seed: int) -> Iterator[Timing]:
    """Every size and number of tokens of one kernel."""
    with loaded(render(kind)) as module:
        for size in SIZES[kind.template]:
            for tokens in rows:
                case = cases.case(kind, size, rows=tokens, dtype=dtype, seed=seed, device="cuda", heads=HEADS)
                outputs = case.observe(module.launch(**case.arguments))
                error = max(
                    cases.mismatch(mine, true, fp8=fp8)
                    for mine, true, fp8 in zip(outputs, case.expected, case.fp8, strict=True)
                )
                torch._dynamo.reset()
                compiled = torch.compile(case.eager, dynamic=False)
                own = time_us(lambda case=case: module.launch(**case.arguments))
                yield Timing(
                    kernel=kind.name,
                    dtype=dtype,
                    size=dict(size),
                    rows=tokens,
                    error=error,
                    kernel_us=own,
                    eager_us=time_us(case.eager),
                    compiled_us=time_us(compiled),
                    gb_s=case.moved_bytes / own / 1e3,
                )


def table(found: list[Timing]) -> str:
    """The results as aligned text."""
    columns = f"{'kernel us':>10} {'eager':>9} {'compile':>9} {'GB/s':>7}  right"
    head = f"{'kernel':22} {'size':26} {'tokens':>7} {columns}"
    lines = [
        f"{t.kernel:22} {' '.join(f'{k}={v}' for k, v in t.size.items()):26} {t.rows:7d} {t.kernel_us:10.1f} "
        f"{t.eager_us:9.1f} {t.compiled_us:9.1f} {t.gb_s:7.0f}  {'yes' if t.right else f'NO ({t.error:.2g})'}"
        for t in found
    ]
    return "\n".join([head, *lines])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-kernels.json"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--dtype", choices=sorted(cases.DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernel", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu/run.py: there is no CUDA device here, so nothing was run", file=sys.stderr)
        return 4
    capability = torch.cuda.get_device_capability()
    found: list[Timing] = []
    for name in chosen.kernel:
        kind = KINDS[name]
        if capability[0] * 10 + capability[1] < kind.min_capability:
            print(f"{name}: needs sm_{kind.min_capability}, left out", file=sys.stderr)
            continue
        found += timings(kind, chosen.rows, chosen.dtype, chosen.seed)
    print(table(found))
    document = {
        "device": torch.cuda.get_device_name(),
        "capability": list(capability),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "seed": chosen.seed,
        "timings": [asdict(timing) | {"right": timing.right} for timing in found],
    }
    chosen.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {chosen.out}")
    return 0 if all(timing.right for timing in found) else 1


if __name__ == "__main__":
    sys.exit(main())
