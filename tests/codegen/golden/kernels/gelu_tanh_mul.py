"""GELU (tanh form) of the gate, times up.

y = gelu(gate) * up

The two halves come from one merged projection, side by side in a row: gate first, then up.
Everything is computed in float32 and cast at the store.

Written by planc from gated.py.jinja; any change belongs there.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    x_ptr,  # [rows, 2 * n], rows x_stride apart
    y_ptr,  # out [rows, n], dense
    rows,
    n,
    x_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    at = row * n + column

    # load
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + n + column, mask=inside, other=0.0).to(tl.float32)

    # epilogue
    # gelu's tanh form; 0.5 * (1 + tanh(u)) is sigmoid(2u), and 0.7978845608 is sqrt(2 / pi)
    u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    y = gate * tl.sigmoid(2.0 * u) * up

    # store
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def configure(n: int) -> dict[str, int]:
    """Compile-time constants and launch options for rows of n outputs."""
    return {"BLOCK": min(1024, triton.next_power_of_2(n)), "num_warps": 4}


def grid(rows: int, n: int) -> tuple[int, int]:
    """Programs to launch: rows by tiles of a row."""
    return rows, triton.cdiv(n, configure(n)["BLOCK"])


def launch(x: torch.Tensor) -> torch.Tensor:
    """Returns y [..., n].

    x is [..., 2 * n], dense in its last dimension, rows evenly apart; float32, float16 or bfloat16.
    """
    n = x.shape[-1] // 2
    flat = x.reshape(-1, 2 * n)
    rows = flat.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if rows:
        kernel[grid(rows, n)](flat, y, rows, n, flat.stride(0), **configure(n))
    return y
