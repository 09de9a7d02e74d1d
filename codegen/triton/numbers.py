"""Runs kernels in the Triton interpreter against their float64 references.

The interpreter is chosen when triton is imported (`TRITON_INTERPRET=1`), so this module runs itself in a
process of its own: kernels go in as JSON on stdin, findings come out on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from planc.codegen.triton.finding import Finding, words
from planc.codegen.triton.kernel import Kernel, from_manifest
from planc.codegen.triton.kinds import KINDS
from planc.errors import ToolFailed

#: Small, since the interpreter takes milliseconds per program, and not powers of two.
SIZES: dict[str, tuple[dict[str, Any], ...]] = {
    "rms_norm.py.jinja": ({"n": 200},),
    "gated.py.jinja": ({"n": 144},),
    "rope_kv.py.jinja": (
        {"head_dim": 24, "rotary": 16},
        {"head_dim": 16, "rotary": 16, "style": "pairs"},
        {"head_dim": 16, "rotary": 8, "style": "interleaved"},
    ),
}
ROWS = 5


def in_interpreter(kernels: Sequence[Kernel], *, seed: int = 0) -> list[Finding]:
    """Findings of all kernels, each dtype and size. Raises ToolFailed when the interpreter cannot run."""
    sent = [{**kernel.described(), "source": kernel.source} for kernel in kernels]
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(seed)],
        input=json.dumps(sent),
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ToolFailed(tool="the Triton interpreter", reason=last, mend="Is the triton package whole?")
    return [Finding(**entry) for entry in json.loads(done.stdout)]


def findings(kernel: Kernel, seed: int) -> Iterator[Finding]:
    """Runs one kernel at each size and dtype; only under the interpreter."""
    from planc.codegen.triton import cases
    from planc.codegen.triton.module import loaded

    kind = KINDS[kernel.name]
    with loaded(kernel) as module:
        for size in SIZES[kind.template]:
            for dtype in kernel.dtypes:
                case = cases.case(kind, size, rows=ROWS, dtype=dtype, seed=seed)
                what = f"numbers {dtype} {words(size)}"
                try:
                    outputs = case.observe(module.launch(**case.arguments))
                except Exception as error:  # whatever a wrong kernel raises in there is the finding
                    yield Finding(kernel.name, what, False, f"{type(error).__name__}: {error}")
                    continue
                worst = max(
                    cases.mismatch(mine, true, fp8=fp8)
                    for mine, true, fp8 in zip(outputs, case.expected, case.fp8, strict=True)
                )
                detail = f"largest error {worst:.2f} of what {dtype} allows"
                yield Finding(kernel.name, what, worst <= 1.0, detail)


def _round_as_hardware_does() -> None:
    """Gives the interpreter round-to-nearest-even casts from float32 to bf16 and e4m3.

    Its own (Triton 3.6 to 3.9) truncate to bf16 and, for e4m3, drop the carry of a mantissa that rounds
    up to the next power of two, so that 1.97 becomes 1.0.
    """
    import numpy as np
    import torch
    import triton.language as tl  # type: ignore[import-untyped]
    from triton.runtime import interpreter  # type: ignore[import-untyped]

    theirs = interpreter._convert_float
    targets = {tl.bfloat16: (torch.bfloat16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, np.uint8)}

    def convert(value: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in targets:
            return theirs(value, source, target, rounding)
        torch_type, bits = targets[target]
        rounded = torch.from_numpy(np.ascontiguousarray(value)).to(torch_type)
        return rounded.view(torch.uint8).numpy().view(bits).reshape(value.shape)

    interpreter._convert_float = convert


def main() -> None:
    sent = [from_manifest(entry, entry["source"]) for entry in json.load(sys.stdin)]
    seed = int(sys.argv[1])
    _round_as_hardware_does()
    print(json.dumps([asdict(finding) for kernel in sent for finding in findings(kernel, seed)]))


if __name__ == "__main__":
    main()
