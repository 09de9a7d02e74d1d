"""Number formats of stored weights: how a matrix is rounded, packed and read back.

Every format keeps the layout `[..., n, k]`: rows are output features, `k` is reduced over, leading
dimensions are experts. Scales follow the rows, so concatenating or cutting rows commutes with
quantization, and so does cutting `k` at a group boundary. Layouts are those of published
checkpoints where one exists:

    int8    int8 [n, k], one fp32 scale per row             compressed-tensors "channel"
    w4a16   int32 [n, k / 8], low nibble first, value + 8,  compressed-tensors "pack-quantized"
            a scale per row and group of k
    fp8     float8_e4m3fn [n, k], one fp32 scale per row    compressed-tensors "float-quantized"
    mxfp4   uint8 [n, k / 2], low nibble first, e2m1, and   OCP Microscaling Formats v1.0, as
            uint8 e8m0 scales [n, k / 32]                   published with gpt-oss
    nvfp4   uint8 [n, k / 2], e2m1, e4m3 scales [n, k/16]   NVFP4 as in modelopt checkpoints
            and one fp32 scale for the matrix

Integers are symmetric with scale = max|w| / ((qmax - qmin) / 2), so |w - w'| <= scale / 2 holds
for every element, the clipped positive extreme included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite e4m3fn
FP4_MAX = 6.0  # largest e2m1
INT4_GROUP = 128
MX_BLOCK = 32
NV_BLOCK = 16

#: vLLM's floor for a dynamic scale: 1 / (448 * 512); keeps rows of zeros from dividing by zero.
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


# -- integers ------------------------------------------------------------------------------


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., n, k]` -> (int8 `[..., n, k]`, fp32 scale `[..., n, 1]`)."""
    w = weight.float()
    scale = _nonzero(w.abs().amax(-1, keepdim=True) / 127.5)
    return (w / scale).round().clamp(-128, 127).to(torch.int8), scale


def dequantize_channel(stored: Tensor, scale: Tensor) -> Tensor:
    """fp32 `[..., n, k]` from one scale per row (int8, fp8)."""
    return stored.float() * scale.float()


def quantize_int4(weight: Tensor, group: int = INT4_GROUP) -> tuple[Tensor, Tensor]:
    """`[..., n, k]` -> (int32 `[..., n, ceil(k / 8)]`, scale `[..., n, ceil(k / group)]`).

    The scale keeps the weight's own dtype and the integers are rounded against that stored value.
    The last group may be shorter than `group`.
    """
    k = weight.shape[-1]
    groups = -(-k // group)
    w = torch.unflatten(_padded(weight.float(), groups * group), -1, (groups, group))
    stored = _nonzero(w.abs().amax(-1) / 7.5).to(weight.dtype)
    stored = torch.where(stored == 0, torch.finfo(weight.dtype).tiny, stored)
    q = (w / stored.float()[..., None]).round().clamp(-8, 7).flatten(-2)[..., :k]
    return pack_int4(q.to(torch.int32)), stored


def dequantize_int4(packed: Tensor, scale: Tensor, k: int, group: int) -> Tensor:
    """fp32 `[..., n, k]`."""
    return unpack_int4(packed, k).float() * spread(scale.float(), group, k)


def pack_int4(values: Tensor) -> Tensor:
    """int32 in -8..7 `[..., k]` -> int32 `[..., ceil(k / 8)]`: value + 8, low nibble first."""
    k = values.shape[-1]
    words = -(-k // 8)
    nibbles = torch.unflatten(_padded(values, words * 8) + 8, -1, (words, 8)).to(torch.int64)
    shifts = torch.arange(0, 32, 4, device=values.device)
    word = (nibbles << shifts).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """The inverse of `pack_int4`; `k` drops the padding of the last word."""
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    return (((packed[..., None] >> shifts) & 0xF) - 8).flatten(-2)[..., :k]


# -- floats --------------------------------------------------------------------------------


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., n, k]` -> (float8_e4m3fn `[..., n, k]`, fp32 scale `[..., n, 1]`)."""
    w = weight.float()
    scale = _nonzero(w.abs().amax(-1, keepdim=True) / FP8_MAX)
    return to_fp8(w / scale), scale


def quantize_fp8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic per-token activations: `[..., k]` -> (float8_e4m3fn `[..., k]`, fp32 `[..., 1]`)."""
    f = x.float()
    scale = (f.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=FP8_MIN_SCALE)
    return to_fp8(f / scale), scale


def quantize_int8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic per-token activations: `[..., k]` -> (int8 `[..., k]`, fp32 scale `[..., 1]`)."""
    f = x.float()
    scale = _nonzero(f.abs().amax(-1, keepdim=True) / 127.0)
    return (f / scale).round().clamp(-128, 127).to(torch.int8), scale


def to_fp8(x: Tensor) -> Tensor:
    """Saturating cast; what a plain cast does beyond 448 depends on device and version."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., n, k]` -> (uint8 `[..., n, k / 2]`, uint8 e8m0 `[..., n, k / 32]`).

    Shared exponent floor(log2(max|w|)) - 2 (OCP MX v1.0, section 6.3: 2 is e2m1's largest
    exponent), elements to nearest even and saturating at 6.
    """
    blocks = _blocks(weight.float(), MX_BLOCK)
    _, exponent = torch.frexp(blocks.abs().amax(-1))  # max = m * 2 ** exponent, m in [0.5, 1)
    shared = (exponent - 1 - 2).clamp(-127, 127)
    stored = (shared + 127).to(torch.uint8)
    scaled = torch.ldexp(blocks, -shared[..., None])
    return pack_fp4(to_fp4(scaled).flatten(-2)[..., : weight.shape[-1]]), stored


def dequantize_mxfp4(packed: Tensor, scale: Tensor, k: int) -> Tensor:
    """fp32 `[..., n, k]`."""
    exponents = spread(scale.to(torch.int32) - 127, MX_BLOCK, k)
    return torch.ldexp(from_fp4(unpack_fp4(packed, k)), exponents)


def quantize_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[..., n, k]` -> (uint8 `[..., n, k / 2]`, e4m3 `[..., n, k / 16]`, fp32 `[..., 1, 1]`).

    The matrix scale max|w| / (448 * 6) uses the whole range of the e4m3 block scales.
    """
    blocks = _blocks(weight.float(), NV_BLOCK)
    largest = blocks.abs().amax(-1)
    matrix = _nonzero(largest.amax((-2, -1), keepdim=True) / (FP8_MAX * FP4_MAX))
    stored = to_fp8(largest / FP4_MAX / matrix)
    scale = _nonzero(stored.float() * matrix)
    codes = to_fp4(blocks / scale[..., None]).flatten(-2)[..., : weight.shape[-1]]
    return pack_fp4(codes), stored, matrix


def dequantize_nvfp4(packed: Tensor, scale: Tensor, matrix: Tensor, k: int) -> Tensor:
    """fp32 `[..., n, k]`."""
    return from_fp4(unpack_fp4(packed, k)) * spread(scale.float() * matrix, NV_BLOCK, k)


def round_mxfp8(x: Tensor) -> Tensor:
    """Activations in e4m3 with power-of-two scales of blocks of 32, read back: fp32 `[..., k]`.

    Shared exponent floor(log2(max|x|)) - 8 (OCP MX v1.0: 8 is e4m3's largest exponent).
    """
    blocks = _blocks(x.float(), MX_BLOCK)
    _, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))
    shared = (exponent - 1 - 8).clamp(-127, 127)
    rounded = torch.ldexp(to_fp8(torch.ldexp(blocks, -shared)).float(), shared)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def round_nvfp4_tokens(x: Tensor) -> Tensor:
    """Activations in NVFP4, the matrix scale taken per token, read back: fp32 `[..., k]`."""
    row = x.unsqueeze(-2)
    return dequantize_nvfp4(*quantize_nvfp4(row), x.shape[-1]).squeeze(-2)


def to_fp4(x: Tensor) -> Tensor:
    """e2m1 codes (sign in bit 3) as uint8, nearest even, saturating."""
    size = x.abs()
    code = torch.zeros_like(size, dtype=torch.uint8)
    for i in range(7):
        middle = (_E2M1[i] + _E2M1[i + 1]) / 2
        code += ((size > middle) if i % 2 == 0 else (size >= middle)).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def from_fp4(codes: Tensor) -> Tensor:
    """fp32 values of e2m1 codes."""
    values = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=codes.device)
    return values[codes.long()]


def pack_fp4(codes: Tensor) -> Tensor:
    """uint8 codes `[..., k]` -> uint8 `[..., ceil(k / 2)]`, low nibble first."""
    k = codes.shape[-1]
    pairs = torch.unflatten(_padded(codes, k + k % 2), -1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_fp4(packed: Tensor, k: int) -> Tensor:
    """The inverse of `pack_fp4`."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)[..., :k]


# -- formats as data -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One stored format.

    parts        suffixes of the stored tensors; "weight" + suffix in a checkpoint
    quantize     (weight `[..., n, k]`, group) -> stored tensors; on meta it gives their shapes
    dequantize   (stored tensors, k, group) -> fp32 `[..., n, k]`
    per_row      one scale per row: a kernel may apply it after the product
    block        elements of k that share a scale; 0: the whole row
    """

    name: str
    parts: tuple[str, ...]
    quantize: Callable[[Tensor, int], tuple[Tensor, ...]]
    dequantize: Callable[[tuple[Tensor, ...], int, int], Tensor]
    per_row: bool
    block: int = 0


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat(
            "int8",
            ("", "_scale"),
            lambda w, g: quantize_int8(w),
            lambda p, k, g: dequantize_channel(*p),
            per_row=True,
        ),
        WeightFormat(
            "w4a16",
            ("_packed", "_scale"),
            quantize_int4,
            lambda p, k, g: dequantize_int4(p[0], p[1], k, g),
            per_row=False,
            block=INT4_GROUP,
        ),
        WeightFormat(
            "fp8",
            ("", "_scale"),
            lambda w, g: quantize_fp8(w),
            lambda p, k, g: dequantize_channel(*p),
            per_row=True,
        ),
        WeightFormat(
            "mxfp4",
            ("_packed", "_scale"),
            lambda w, g: quantize_mxfp4(w),
            lambda p, k, g: dequantize_mxfp4(p[0], p[1], k),
            per_row=False,
            block=MX_BLOCK,
        ),
        WeightFormat(
            "nvfp4",
            ("_packed", "_scale", "_scale_2"),
            lambda w, g: quantize_nvfp4(w),
            lambda p, k, g: dequantize_nvfp4(p[0], p[1], p[2], k),
            per_row=False,
            block=NV_BLOCK,
        ),
    )
}


def spread(scale: Tensor, group: int, k: int) -> Tensor:
    """`[..., ceil(k / group)]` -> `[..., k]`, each value repeated over its group."""
    return scale.repeat_interleave(group, -1)[..., :k]


def _padded(x: Tensor, k: int) -> Tensor:
    short = k - x.shape[-1]
    return torch.nn.functional.pad(x, (0, short)) if short else x


def _blocks(x: Tensor, size: int) -> Tensor:
    count = _ceil(x.shape[-1], size)
    return torch.unflatten(_padded(x, count * size), -1, (count, size))


def _nonzero(scale: Tensor) -> Tensor:
    """Rows of zeros get scale 1, so that they read back as zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
