"""What kernels cost on one GPU: the protocol, and the roofline that needs no measurement.

Kernels come in stacks: R specs, evaluated at once over N loads as [R, N] arrays. A measured
profile implements the same protocol, family by family, and says so in `source`.

The roofline is `launch + max(compute, memory)` for matrix products and attention, and
`max(launch, memory)` for pointwise kernels (Williams et al. 2009; LLM-Viewer's per-op form), with
tile and wave quantization of the compute part. All efficiencies are named in `data/efficiencies.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from planc.cost_model.catalogue import Gpu, Provenance
from planc.cost_model.efficiency import Efficiencies, efficiencies
from planc.cost_model.features import Array
from planc.cost_model.formats import fmt, product_precision

Bound = npt.NDArray[np.int8]
BOUNDS = ("compute", "memory", "launch", "link")
COMPUTE, MEMORY, LAUNCH, LINK = range(4)


@dataclass(frozen=True, slots=True)
class Gemm:
    """[m, k] @ [k, n]: `weights` and `activations` are formats, `out_bytes` per element of the result."""

    n: float
    k: float
    weights: str
    activations: str
    out_bytes: float = 2.0


@dataclass(frozen=True, slots=True)
class GroupedGemm:
    """Routed experts on one rank: `experts` of them, together `elements` weights, of which tokens touch some.

    total_experts, top_k   of the whole layer; uniform routing touches E (1 - (1 - k/E)^T) of them
    flops_per_token        of one token through its top_k experts, this rank's share
    reads, writes          activation elements per token
    """

    experts: float
    total_experts: int
    top_k: int
    elements: float
    flops_per_token: float
    reads: float
    writes: float
    weights: str
    activations: str
    ranks: int = 1  # EP ranks that tokens are spread over


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention, a recurrence, or a product of activations: work besides dense weights.

    phase         "prefill", "decode" or "step": which kernel an engine would take
    kv_bytes      per cache element
    weight_bytes  weights read per call (projections inside the kernel, as in MLA)
    """

    phase: str
    kv_bytes: float
    act_bytes: float = 2.0
    weight_bytes: float = 0.0
    recurrent: bool = False


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds [R, N] of one call, and what bounds each."""

    seconds: Array
    bound: Bound


class KernelCosts(Protocol):
    """Seconds of kernels on one GPU. Amount arrays are [R, N], one row per spec."""

    @property
    def source(self) -> Provenance:
        """The least well founded of the costs."""
        ...

    def gemm(self, specs: Sequence[Gemm], m: Array) -> Times:
        """m: rows of the left operand."""
        ...

    def grouped_gemm(self, specs: Sequence[GroupedGemm], tokens: Array) -> Times:
        """tokens: tokens routed in the layer, over all ranks that share its experts."""
        ...

    def attention(
        self, specs: Sequence[Attention], flops: Array, kv_elements: Array, act_elements: Array
    ) -> Times: ...

    def elementwise(self, launches: Array, nbytes: Array) -> Times:
        """launches: kernels per call [R, 1]; 0 for work fused into another kernel."""
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """Physics with named efficiencies; no fitted table."""

    gpu: Gpu
    named: Efficiencies = field(default_factory=efficiencies)
    source: Provenance = "roofline"

    #: output tiles of common GEMM kernels, (rows, columns), each with the share of peak it reaches alone
    TILES = ((16, 128, 0.45), (64, 128, 0.85), (128, 128, 0.97), (128, 256, 1.0))

    def gemm(self, specs: Sequence[Gemm], m: Array) -> Times:
        n, k = _column(s.n for s in specs), _column(s.k for s in specs)
        weight = _column(fmt(s.weights).bytes for s in specs)
        act = _column(fmt(s.activations).bytes for s in specs)
        out = _column(s.out_bytes for s in specs)
        memory = (n * k * weight + m * (k * act + n * out)) / self._bandwidth("gemm_memory")
        compute = self._tiled(m, n, k, self._peaks("gemm_peak", specs))
        return self._after(self._us("gemm_launch_us"), compute, memory, m > 0)

    def grouped_gemm(self, specs: Sequence[GroupedGemm], tokens: Array) -> Times:
        experts = _column(s.experts for s in specs)
        share = _column(s.top_k / s.total_experts for s in specs)
        ranks = _column(float(s.ranks) for s in specs)
        touched = experts * -np.expm1(tokens * np.log1p(-np.minimum(share, 1 - 1e-9)))
        touched = np.maximum(touched, np.minimum(tokens, 1.0) * np.minimum(experts * share, experts))
        mean = tokens * share * experts  # (token, expert) pairs on this rank
        chance = np.sqrt(2 * np.log(np.maximum(ranks, 1.0)) / np.maximum(mean, 1.0))
        skew = np.where(ranks > 1, 1 + self.named.value("expert_skew") + chance, 1.0)
        skew = np.minimum(skew, ranks)
        pairs = mean * skew
        weight = _column(fmt(s.weights).bytes for s in specs)
        act = _column(fmt(s.activations).bytes for s in specs)
        moved = _column(s.reads for s in specs) * act + 2.0 * _column(s.writes for s in specs)
        per_expert = _column(s.elements for s in specs) / experts
        nbytes = touched * per_expert * weight
        memory = (nbytes + tokens * moved * skew) / self._bandwidth("grouped_gemm_memory")
        tile = self.named.value("expert_tile")
        padded = pairs + touched * (tile / 2)  # on average half a tile per touched expert is padding
        per_pair = _column(s.flops_per_token for s in specs) / (share * experts)
        peak = self._peaks("gemm_peak", specs) * self.named.value("grouped_gemm_peak")
        return self._after(self._us("grouped_gemm_launch_us"), padded * per_pair / peak, memory, tokens > 0)

    def attention(
        self, specs: Sequence[Attention], flops: Array, kv_elements: Array, act_elements: Array
    ) -> Times:
        kv, act = _column(s.kv_bytes for s in specs), _column(s.act_bytes for s in specs)
        peaks, widths = [], []
        for spec in specs:
            name = "recurrence" if spec.recurrent else "attention"
            part = "recurrence_peak" if spec.recurrent else "attention_prefill_peak"
            peaks.append(self.gpu.peak_flops("bf16") * self.named.on(part, self.gpu, "bf16"))
            widths.append(self._bandwidth(f"{name}_memory" if spec.recurrent else "attention_decode_memory"))
        compute = flops / _column(peaks)
        fixed = _column(s.weight_bytes for s in specs)
        memory = (kv_elements * kv + act_elements * act + fixed) / _column(widths)
        return self._after(self._us("attention_launch_us"), compute, memory, act_elements > 0)

    def elementwise(self, launches: Array, nbytes: Array) -> Times:
        memory = nbytes / self._bandwidth("elementwise_memory")
        floor = launches * self._us("elementwise_launch_us")
        active = nbytes > 0
        seconds = np.where(active, np.maximum(memory, floor), 0.0)
        return Times(seconds, np.where(memory >= floor, MEMORY, LAUNCH).astype(np.int8))

    def _tiled(self, m: Array, n: Array, k: Array, peak: Array) -> Array:
        """Compute time of the best tile: whole waves over the SMs, the inner dimension split if some idle."""
        sms = float(self.gpu.sm_count)
        best = np.full(np.broadcast_shapes(m.shape, n.shape), np.inf)
        for rows, columns, alone in self.TILES:
            tiles = np.ceil(m / rows) * np.ceil(n / columns)
            waves = np.ceil(tiles / sms)
            idle = np.where(
                tiles < sms, np.minimum(sms // np.maximum(tiles, 1.0), np.maximum(k // 512, 1.0)), 1.0
            )
            per_wave = 2.0 * rows * columns * k / (peak / sms * alone)
            best = np.minimum(best, waves * per_wave / idle)
        return best

    def _peaks(self, name: str, specs: Sequence[Gemm] | Sequence[GroupedGemm]) -> Array:
        found = []
        for spec in specs:
            precision = product_precision(spec.weights, spec.activations)
            if precision not in self.gpu.peak_tflops:
                precision = "bf16" if "bf16" in self.gpu.peak_tflops else "fp32"
            found.append(self.gpu.peak_flops(precision) * self.named.on(name, self.gpu, precision))
        return _column(found)

    def _bandwidth(self, name: str) -> float:
        return self.gpu.memory_bytes_s * self.named.value(name)

    def _us(self, name: str) -> float:
        return self.named.value(name) * 1e-6

    @staticmethod
    def _after(launch: float, compute: Array, memory: Array, active: npt.NDArray[np.bool_]) -> Times:
        work = np.maximum(compute, memory)
        bound = np.where(compute > memory, COMPUTE, MEMORY)
        bound = np.where(work < launch, LAUNCH, bound).astype(np.int8)
        return Times(np.where(active, launch + work, 0.0), bound)


def _column(values: object) -> Array:
    """One number per spec as [R, 1]."""
    return np.array(list(values), dtype=np.float64).reshape(-1, 1)  # type: ignore[call-overload]
