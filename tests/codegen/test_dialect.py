"""Kernels against the ops they stand for: the same numbers as the dialect's own references, in fp32.

Run in a process of its own, since Triton chooses its interpreter when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch, planc.ir.ops
from planc.codegen.triton.kinds import KINDS
from planc.codegen.triton.module import loaded
from planc.codegen.triton.render import render

ops, g = torch.ops.planc, torch.Generator().manual_seed(5)
def draw(*shape): return torch.randn(*shape, generator=g)
def same(name, mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6, msg=lambda m: f"{name}: {m}")

x, r, w = draw(3, 7, 48), draw(3, 7, 48), draw(48)
for mode, offset in (("cast_mul", 0.0), ("mul_cast", 0.0), ("one_plus", 1.0)):
    with loaded(render(KINDS["rms_norm"])) as k:
        same(mode, k.launch(x, w, 1e-5, offset), ops.rms_norm(x, w, 1e-5, mode))
    with loaded(render(KINDS["add_rms_norm"])) as k:
        theirs = ops.add_rms_norm(x, r, w, 1e-5, mode)
        for mine, their in zip(k.launch(x, r, w, 1e-5, offset), theirs, strict=True):
            same("add " + mode, mine, their)
for act in ("silu", "gelu", "gelu_tanh"):
    with loaded(render(KINDS[act + "_mul"])) as k:
        same(act, k.launch(x), getattr(ops, act + "_mul")(x))

T, HQ, HK, D = 6, 4, 2, 16
for style, rotary in (("half", 16), ("half", 8), ("split", 16), ("interleaved", 16), ("pairs", 16)):
    for norm in (False, True):
        q, k_, v = draw(T, HQ, D), draw(T, HK, D), draw(T, HK, D)
        wq, wk = draw(D), draw(D)
        angle = draw(T, rotary // 2)
        cos, sin = angle.cos(), angle.sin()
        if style in ("half", "interleaved"):
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        slots = torch.tensor([9, 2, 30, 4, 17, 0])
        caches = [draw(4, 8, HK, D) for _ in range(2)]
        mine, theirs = [c.clone() for c in caches], [c.clone() for c in caches]
        extra = (wq, wk, 1e-6) if norm else ()
        with loaded(render(KINDS["qk_norm_rope_kv" if norm else "rope_kv"])) as k:
            out = k.launch(q, k_, v, cos, sin, slots, *mine, rotary, *extra, style=style)
        heads = [t.transpose(0, 1)[None] for t in (q, k_, v)]
        want = ops.rope_kv_write(
            *heads, cos[None], sin[None], *theirs, slots, wq if norm else None, wk if norm else None,
            1e-6, "cast_mul" if norm else "", style)
        same(f"{style} q", out, want[0].transpose(0, 1))
        same(f"{style} k", mine[0], theirs[0])
        same(f"{style} v", mine[1], theirs[1])
print("equal")
"""


def test_same_numbers_as_the_dialect(tmp_path: Path) -> None:
    file = tmp_path / "compare.py"
    file.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
