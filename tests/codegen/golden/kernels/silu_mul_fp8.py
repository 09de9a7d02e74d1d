"""SiLU of the gate, times up, stored as fp8 with one scale per token.

y = gate * sigmoid(gate) * up

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
    scale_ptr,  # out [rows], float32: y = y_ptr * scale
    rows,
    n,
    x_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    at = row * n + column

    # load
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + n + column, mask=inside, other=0.0).to(tl.float32)

    # epilogue
    y = gate * tl.sigmoid(gate) * up

    # store
    # one scale per row, so that its largest magnitude becomes 448, the largest finite e4m3 number
    largest = tl.max(tl.abs(y), axis=1)[:, None]
    scale = tl.maximum(largest, 1e-10) / 448.0
    quantised = tl.clamp(y / scale, -448.0, 448.0)
    tl.store(y_ptr + at, quantised.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


def configure(n: int) -> dict[str, int]:
    """Compile-time constants and launch options for rows of n outputs."""
    block = triton.next_power_of_2(n)  # the whole row: its largest magnitude sets the scale
    return {"BLOCK": block, "num_warps": min(32, max(4, block // 1024))}


def grid(rows: int, n: int) -> tuple[int]:
    """Programs to launch: one per row."""
    return (rows,)


def launch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y [..., n] as float8_e4m3fn and its scale [rows] as float32.

    x is [..., 2 * n], dense in its last dimension, rows evenly apart; float32, float16 or bfloat16; n is
    at most 32768.
    """
    n = x.shape[-1] // 2
    flat = x.reshape(-1, 2 * n)
    rows = flat.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        kernel[grid(rows, n)](flat, y, scale, rows, n, flat.stride(0), **configure(n))
    return y, scale
