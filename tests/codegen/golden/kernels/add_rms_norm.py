"""Residual addition and RMS norm.

total = x + residual; y = total / sqrt(mean(total^2) + eps) * (weight + weight_offset)

One program normalises ROWS whole rows, held in registers as one [ROWS, BLOCK] tile, so each element is
read once and written once. Everything is computed in float32 and cast at the store.

Written by planc from rms_norm.py.jinja; any change belongs there.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    x_ptr,  # [rows, n], rows x_stride apart
    residual_ptr,  # [rows, n], dense
    sum_ptr,  # out [rows, n], dense: x + residual; may be residual itself
    weight_ptr,  # [n]
    y_ptr,  # out [rows, n], dense
    rows,
    n,
    x_stride,
    eps,
    weight_offset,  # added to the weight: 1.0 for models that store it as a difference from one
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    at = row * n + column

    # load
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = x + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=inside)

    # compute: masked lanes are zero, so they add nothing to the sum
    mean_square = tl.sum(x * x, axis=1)[:, None] / n
    y = x * tl.rsqrt(mean_square + eps)

    # epilogue
    weight = tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    y = y * (weight + weight_offset)

    # store
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def configure(n: int) -> dict[str, int]:
    """Compile-time constants and launch options for rows of n elements: about 4096 elements per program."""
    block = triton.next_power_of_2(n)
    tile = max(block, 4096 if block <= 1024 else block)
    return {"ROWS": max(1, tile // block), "BLOCK": block, "num_warps": min(32, max(4, tile // 1024))}


def grid(rows: int, n: int) -> tuple[int]:
    """Programs to launch."""
    return (triton.cdiv(rows, configure(n)["ROWS"]),)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y [..., n], then x + residual [..., n].

    x is [..., n], dense in its last dimension, rows evenly apart; float32, float16 or bfloat16; n is at
    most 32768.
    """
    n = x.shape[-1]
    flat = x.reshape(-1, n)
    rows = flat.shape[0]
    residual = residual.contiguous()
    total = torch.empty_like(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows:
        kernel[grid(rows, n)](
            flat,
            residual,
            total,
            weight,
            y,
            rows,
            n,
            flat.stride(0),
            eps,
            weight_offset,
            **configure(n),
        )
    return y, total
