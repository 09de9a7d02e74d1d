"""The roofline with named efficiencies: what kernels cost where nothing was measured.

`launch + max(compute, memory)` for matrix products and attention, `max(launch, memory)` for
pointwise kernels (Williams et al. 2009), with tile and wave quantization of the compute part.
All efficiencies are named in `data/efficiencies.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from planc.cost_model import attention_kernels, softmax
from planc.cost_model.attention_kernels import AttentionKernels
from planc.cost_model.catalogue import Gpu, Precision, Provenance
from planc.cost_model.collectives import Fabric, Kind, Own, group_seconds
from planc.cost_model.efficiency import Efficiencies, efficiencies
from planc.cost_model.experts import Curve, ExpertKernel, curve, stack
from planc.cost_model.features import Array
from planc.cost_model.formats import fmt, product_precision
from planc.cost_model.kernels import (
    COMPUTE,
    LAUNCH,
    MEMORY,
    Attention,
    AttentionLoad,
    Gemm,
    GroupedGemm,
    Times,
    column,
)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Implements `KernelCosts` for any GPU of the catalogue."""

    gpu: Gpu
    named: Efficiencies = field(default_factory=efficiencies)
    own: Own = field(default_factory=Own)  # the engine's own all-reduce
    engine: str = ""  # whose attention kernels; "": what most engines run
    attention_kernels: AttentionKernels = field(default_factory=attention_kernels.kernels)

    @property
    def source(self) -> Provenance:
        """Physics; for a processor even the peaks are a guess until it is measured."""
        return "assumed" if self.gpu.vendor == "cpu" else "roofline"

    def gemm(self, specs: Sequence[Gemm]) -> Callable[[Array], Times]:
        """launch + depth * k + (compute^p + memory^p)^(1/p): the tile loop over the inner dimension takes its
        time whatever its width, and loads overlap arithmetic imperfectly."""
        n, k = column([s.n for s in specs]), column([s.k for s in specs])
        bandwidth = self._bandwidth("gemm_memory")
        fixed = n * k * column([fmt(s.weights).bytes for s in specs]) / bandwidth
        acts = k * column([fmt(s.activations).bytes for s in specs])
        per_row = (acts + n * column([s.out_bytes for s in specs])) / bandwidth
        tiled = self._tiled(n, k, self._peaks(specs))
        clock, power = self.gpu.clock_mhz * 1e6, self.named.value("gemm_overlap")
        own = self.named.measured("gemm_launch_us", self.gpu)
        launch = self.named.value("gemm_kcycles") * 1e3 / clock if own is None else own * 1e-6
        start = launch + k * self.named.value("gemm_depth_cycles") / clock

        def price(m: Array) -> Times:
            compute, memory = tiled(m), fixed + m * per_row
            work = (compute**power + memory**power) ** (1 / power)
            bound = np.where(compute > memory, COMPUTE, MEMORY)
            bound = np.where(work < start, LAUNCH, bound).astype(np.int8)
            return Times(np.where(m > 0, start + work, 0.0), bound)

        return price

    def grouped_gemm(self, specs: Sequence[GroupedGemm]) -> Callable[[Array], Times]:
        """`planc.cost_model.experts`, with constants that were fitted over all GPUs and engines."""
        return stack([self.experts(spec) for spec in specs])

    def experts(self, spec: GroupedGemm) -> Curve:
        precision = self._known(product_precision(spec.weights, spec.activations))
        kernel = ExpertKernel(**{n: self._expert(f"expert_{n}", precision) for n in ExpertKernel.names()})
        if self.gpu.vendor != "cpu":
            kernel = kernel.at_clock(self.named.value("expert_mhz") / self.gpu.clock_mhz)
        peak = self.gpu.peak_flops(precision)
        return curve(spec, kernel, fmt(spec.weights).bytes, self.gpu.memory_bytes_s, peak)

    def _expert(self, name: str, precision: Precision) -> float:
        own = self.named.measured(name, self.gpu)
        return self.named.on(name, self.gpu, precision) if own is None else own

    def attention(self, specs: Sequence[Attention]) -> Callable[[AttentionLoad], Times]:
        prices = [self._softmax(s) if s.kind == "attention" else self._state(s) for s in specs]

        def price(load: AttentionLoad) -> Times:
            seconds = np.zeros_like(load.flops)
            bound = np.full(load.flops.shape, LAUNCH, dtype=np.int8)
            for row, one in enumerate(prices):
                total, compute, memory = one(row, load)
                seconds[row] = np.where(load.acts[row] > 0, total, 0.0)
                work = np.where(compute > memory, COMPUTE, MEMORY)
                bound[row] = np.where(2 * np.maximum(compute, memory) < total, LAUNCH, work)
            return Times(seconds, bound)

        return price

    def _softmax(self, spec: Attention) -> Callable[[int, AttentionLoad], tuple[Array, Array, Array]]:
        """`planc.cost_model.softmax`, with the constants of the kernel that this engine would run."""
        narrow, head_dim = spec.kv_bytes <= 1.0, 0 if spec.latent else spec.qk_dim
        choice = self.attention_kernels.choice(self.gpu.arch, self.engine, head_dim, narrow)
        known = attention_kernels.constants(self.attention_kernels, choice, self.gpu, self.named)
        if spec.latent:
            known = replace(known, decode_peak=known.prefill_peak)
        multiplies = choice is not None and choice.narrow_products and "fp8" in self.gpu.peak_tflops
        machine = self.machine()
        launch = self._us("attention_launch_us")
        heads = max(spec.q_heads, 1.0)
        pair_flops = spec.pair_flops or 2.0 * heads * (spec.qk_dim + spec.v_dim)

        def price(row: int, load: AttentionLoad) -> tuple[Array, Array, Array]:
            tokens, sequences = np.maximum(load.tokens, 1.0), np.maximum(load.sequences, 1.0)
            pairs = load.flops[row] / pair_flops if pair_flops else 0.0 * load.flops[row]
            appended = tokens * spec.key_width * spec.kv_bytes
            work = softmax.Work(
                flops=load.flops[row],
                exps=pairs * heads,
                cached=load.kv[row] * spec.kv_bytes - appended + spec.weight_bytes,
                new=load.acts[row] * spec.act_bytes + appended,
                blocks=sequences * max(spec.kv_heads, 1.0),
                reach=np.maximum(pairs / tokens, 1.0),
                loop=np.zeros_like(tokens),
                narrow=float(narrow),
                narrow_products=float(narrow and multiplies),
            )
            if spec.part == "decode":
                total, compute, memory = softmax.decode_seconds(known, machine, work)
            else:
                work = work.tiled(tokens / sequences, load.context, sequences * heads)
                total, compute, memory = softmax.prefill_seconds(known, machine, work)
            return launch + total, compute, memory

        return price

    def _state(self, spec: Attention) -> Callable[[int, AttentionLoad], tuple[Array, Array, Array]]:
        """Recurrences and products of activations: operations or bytes, whichever take longer."""
        recurrent = spec.kind == "recurrence"
        precision = self._known("bf16")
        named = ("recurrence_peak", "recurrence_memory") if recurrent else ("gemm_peak", "gemm_memory")
        peak = self.gpu.peak_flops(precision) * self.named.on(named[0], self.gpu, precision)
        width = self._bandwidth(named[1])
        launch = self._us("gemm_launch_us" if not recurrent else "recurrence_launch_us")

        def price(row: int, load: AttentionLoad) -> tuple[Array, Array, Array]:
            moved = load.kv[row] * spec.kv_bytes + load.acts[row] * spec.act_bytes + spec.weight_bytes
            compute, memory = load.flops[row] / peak, moved / width
            return launch + np.maximum(compute, memory), compute, memory

        return price

    def collective(self, kind: Kind, ranks: int, fabric: Fabric) -> Callable[[Array], Array]:
        return lambda size: group_seconds(kind, size, ranks, self.gpu, fabric, own=self.own)

    def machine(self) -> softmax.Machine:
        """What `planc.cost_model.softmax` knows of this GPU."""
        cache, rate = self._cache
        return softmax.Machine(
            self.gpu.peak_flops(self._known("bf16")),
            self.gpu.memory_bytes_s,
            float(self.gpu.sm_count),
            self.gpu.clock_mhz * 1e6,
            self.named.on("attention_exp_per_cycle", self.gpu),
            cache,
            rate,
        )

    @property
    def _cache(self) -> tuple[float, float]:
        """Bytes that a kernel finds of its neighbours' output in the last-level cache, and its bytes/s."""
        clocks = self.gpu.sm_count * self.gpu.clock_mhz * 1e6
        held = self.gpu.l2_mib * 1024**2 * self.named.on("cache_share", self.gpu)
        return max(held, 1.0), self.named.on("cache_bytes_per_clock", self.gpu) * clocks

    @property
    def elementwise_floor(self) -> float:
        """Seconds that no pointwise kernel of its own is shorter than."""
        return self._us("elementwise_launch_us")

    def elementwise(self, launches: Array) -> Callable[[Array], Times]:
        """What fits the cache comes from there (the kernel before left it); twice as much evicts itself."""
        start, floor = launches * self._us("elementwise_start_us"), launches * self.elementwise_floor
        cache, rate = self._cache
        far = 1.0 / self._bandwidth("elementwise_memory")
        near = min(1.0 / rate, far)

        def price(nbytes: Array) -> Times:
            missed = np.clip(nbytes / cache - 1.0, 0.0, 1.0)
            memory = start + nbytes * (near + missed * (far - near))
            seconds = np.where(nbytes > 0, np.maximum(memory, floor), 0.0)
            return Times(seconds, np.where(memory >= floor, MEMORY, LAUNCH).astype(np.int8))

        return price

    def _tiled(self, n: Array, k: Array, peak: Array) -> Callable[[Array], Array]:
        """Compute time of the best tile: whole waves over the SMs, the inner dimension split if some idle."""
        sms = float(self.gpu.sm_count)
        split = np.maximum(k // self.named.value("split_k_depth"), 1.0)
        plans = []
        for rows, columns, alone in self.named.tiles:
            per_wave = 2.0 * rows * columns * k / (peak / sms * alone)
            plans.append((rows, np.ceil(n / columns), per_wave))

        def seconds(m: Array) -> Array:
            best: Array | None = None
            for rows, across, per_wave in plans:
                tiles = np.maximum(np.ceil(m / rows), 1.0) * across
                idle = np.clip(np.floor(sms / tiles), 1.0, split)
                found: Array = np.ceil(tiles / sms) * per_wave / idle
                best = found if best is None else np.minimum(best, found)
            assert best is not None
            return best

        return seconds

    def _peaks(self, specs: Sequence[Gemm] | Sequence[GroupedGemm]) -> Array:
        found = []
        for spec in specs:
            precision = self._known(product_precision(spec.weights, spec.activations))
            found.append(self.gpu.peak_flops(precision) * self.named.on("gemm_peak", self.gpu, precision))
        return column(found)

    def _known(self, precision: Precision) -> Precision:
        """The arithmetic itself, or what a GPU without units for it runs instead."""
        if precision in self.gpu.peak_tflops:
            return precision
        return "bf16" if "bf16" in self.gpu.peak_tflops else "fp32"

    def _bandwidth(self, name: str) -> float:
        return self.gpu.memory_bytes_s * self.named.on(name, self.gpu)

    def _us(self, name: str) -> float:
        return self.named.on(name, self.gpu) * 1e-6
