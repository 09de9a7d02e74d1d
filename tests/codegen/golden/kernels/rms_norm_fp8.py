"""RMS norm, stored as fp8 with one scale per token.

y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)

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
    weight_ptr,  # [n]
    y_ptr,  # out [rows, n], dense
    scale_ptr,  # out [rows], float32: y = y_ptr * scale
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

    # compute: masked lanes are zero, so they add nothing to the sum
    mean_square = tl.sum(x * x, axis=1)[:, None] / n
    y = x * tl.rsqrt(mean_square + eps)

    # epilogue
    weight = tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    y = y * (weight + weight_offset)

    # store
    # one scale per row, so that its largest magnitude becomes 448, the largest finite e4m3 number
    largest = tl.max(tl.abs(y), axis=1)[:, None]
    scale = tl.maximum(largest, 1e-10) / 448.0
    quantised = tl.clamp(y / scale, -448.0, 448.0)
    tl.store(y_ptr + at, quantised.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


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
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y [..., n] as float8_e4m3fn and its scale [rows] as float32.

    x is [..., n], dense in its last dimension, rows evenly apart; float32, float16 or bfloat16; n is at
    most 32768.
    """
    n = x.shape[-1]
    flat = x.reshape(-1, n)
    rows = flat.shape[0]
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        kernel[grid(rows, n)](
            flat,
            weight,
            y,
            scale,
            rows,
            n,
            flat.stride(0),
            eps,
            weight_offset,
            **configure(n),
        )
    return y, scale
