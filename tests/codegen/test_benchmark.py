"""The GPU benchmark: says so and exits 4 where there is none; its cases run on any device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu/run.py"


def test_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "out.json"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_eager_references_agree_with_the_float64_ones() -> None:
    """What kernels are timed against computes the same thing."""
    import torch

    from planc.codegen.triton import cases
    from planc.codegen.triton.kinds import KINDS

    for kind in KINDS.values():
        size = {"n": 64} if "rope" not in kind.name else {"head_dim": 16, "rotary": 8}
        case = cases.case(kind, size, rows=5, dtype="fp32", seed=3)
        first = case.eager()
        head = first[0] if isinstance(first, tuple) else first
        if case.fp8[0]:
            head = head.float() * first[1][:, None]
        tolerance = 0.07 if case.fp8[0] else 1e-5
        torch.testing.assert_close(head.double(), case.expected[0], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_all_kernels_on_this_gpu(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "out.json", "--rows", "64"], check=True)
