"""FlashInfer's product of fp8 operands with a scale per block on Blackwell, by its tiles.

SGLang takes it where DeepGEMM is switched off (`--fp8-gemm-backend flashinfer_trtllm`). It is TensorRT-LLM's
kernel for few tokens at any number of them: an SM computes 128 outputs of 8, 16 or 32 tokens at a time, by
the shape of the weights alone, and reads both operands anew for each such tile. A launch takes as many
rounds as its tiles fill the GPU; prompts take three to twelve times as long as with DeepGEMM.

No table holds it. Tiles are those of FlashInfer's `select_kernel_fp8` (csrc/trtllm_gemm_runner.cu); times are
read off two published runs on B200: [m, 7168] @ [7168, 576] takes 16.4 us up to 256 rows, and 28.7, 41.2 and
63.5 us with 1024, 2048 and 4096 (sgl-project/sglang#13528), [m, 1024] @ [1024, 2048] takes 5.1 us up to 256
rows and 8.7 us with 512 (NVIDIA/cutlass#2923). Of the largest of the first, [m, 7168] @ [7168, 24576], whose
weights outgrow the L2 cache, 2048 rows (1632 us) tell what it draws from memory; 256 rows are met within 8 %,
8 rows are 43 % short (47 us).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.features import Array
from planc.cost_model.kernels import Gemm

#: format of weights that it multiplies (`lower.BLOCK_FP8`), its name, and the GPUs that it is built for
_WEIGHTS, NAME, _ARCHS = "fp8_block", "flashinfer_trtllm", ("sm_100", "sm_103")

#: outputs of a tile
_WIDTH = 128

#: s: of a launch, and of a tile besides its operands
_LAUNCH_S, _TILE_S = 1.5e-6, 2.1e-6

#: bytes/s of an SM from the L2 cache: about 60 a clock
_SM_BYTES_S = 111e9

#: of memory bandwidth
_DRAWN = 0.87


def runs(spec: Gemm, gpu: Gpu, engine: EngineProfile) -> bool:
    """Whether the engine was told to run this product with it."""
    return engine.fp8_gemm_backend == NAME and spec.weights == _WEIGHTS and gpu.arch in _ARCHS


def tile_rows(n: float, k: float) -> int:
    """Tokens of a tile for weights [k, n]."""
    if n / k >= 32:
        return 8
    return 32 if n / k <= 2 or n >= 20000 else 16


def seconds(m: Any, spec: Gemm, gpu: Gpu) -> Array:
    """[m, k] @ [k, n], s: rounds of tiles out of the L2 cache, or memory where that takes longer."""
    rows, n, k = tile_rows(spec.n, spec.k), spec.n, spec.k
    passes = np.ceil(np.asarray(m, dtype=np.float64) / rows)
    rounds = np.ceil(passes * np.ceil(n / _WIDTH) / gpu.sm_count)
    tiles = rounds * (_TILE_S + (_WIDTH + rows) * k / _SM_BYTES_S)
    weights = n * k * np.where(n * k > gpu.l2_mib * 2**20, passes, 1.0)
    memory = (weights + m * (k + spec.out_bytes * n)) / (_DRAWN * gpu.memory_bytes_s)
    return np.asarray(_LAUNCH_S + np.maximum(tiles, memory))
