"""Measured rows of attention kernels, with the work that the cost model counts for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model.catalogue import Precision
from planc.cost_model.features import Array
from planc.cost_model.fitting import sources
from planc.cost_model.fitting.surface import Mask
from planc.cost_model.measured.attention_linear import BLOCK, linear_work

#: DeepSeek-V3: rank of the latent, rotary width, and each head's other widths
_RANK, _ROTARY, _PLAIN, _VALUE = 512, 64, 128, 128
#: Qwen3.5: width of the rule's heads, taps of the convolution; blocks of channels are as wide
_STATE, _TAPS = 128.0, 4.0
_GROWN = 1.1  # times as long, at least, for twice as many value heads


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kernel: `coords` by axis name; operations, bytes as `Ideal.seconds` takes them, seconds,
    and the KV heads that prefill writes to the cache, where rows tell them; all [rows]."""

    name: str
    key: Mapping[str, str | float | int]
    source: str
    precision: Precision
    coords: Mapping[str, Array]
    flops: Array
    cached: Array
    new: Array
    seconds: Array
    kv_heads: Array | None = None

    def take(self, mask: Mask) -> Rows:
        kept = {name: getattr(self, name)[mask] for name in ("flops", "cached", "new", "seconds")}
        coords = {name: values[mask] for name, values in self.coords.items()}
        return replace(
            self, coords=coords, kv_heads=None if self.kv_heads is None else self.kv_heads[mask], **kept
        )


def softmax(folder: Path, gpu: str) -> Iterator[Rows]:
    """MHA and GQA kernels of every engine, by phase, head dimension, window and cache format."""
    for part, table in (("prefill", "context_attention_perf"), ("decode", "generation_attention_perf")):
        for source in sources.tables(folder, "attention", table, gpu=gpu):
            frame = source.read()
            if "window_size" not in frame:
                frame = frame.assign(window_size=0)
            for (head_dim, window, cache), mine in frame.groupby(
                ["head_dim", "window_size", "kv_cache_dtype"]
            ):
                yield _softmax(source, part, int(head_dim), int(window), str(cache), mine)


def _softmax(source: sources.Source, part: str, head_dim: int, window: int, cache: str, frame: Any) -> Rows:
    frame = frame[frame["kernel_source"] == frame["kernel_source"].mode()[0]]
    if frame["attn_dtype"].nunique() > 1:  # TensorRT-LLM multiplies in the cache's format, others widen it
        frame = frame[frame["attn_dtype"] == ("fp8" if source.engine == "trtllm" else "bfloat16")]
    batch, q, kv = (_column(frame, c) for c in ("batch_size", "num_heads", "num_key_value_heads"))
    kv_bytes, decode = _cache_bytes(cache), part == "decode"
    reach = _column(frame, "step") + 1.0 if decode else _column(frame, "isl")
    seen = np.minimum(reach, float(window or np.inf))
    tokens = batch if decode else batch * reach
    pairs = batch * (seen if decode else seen * (seen + 1) / 2 + (reach - seen) * seen)
    keys = batch * (seen if decode else reach)
    key = {"head_dim": head_dim, "kv_bytes": kv_bytes, "window": window}
    return Rows(
        name=f"{part} {source.engine} {head_dim} {cache} w{window}",
        key={"op": "softmax", "part": part, "engine": source.engine, **key},
        source=_text(source, frame),
        precision="fp8" if frame["attn_dtype"].iloc[0] == "fp8" else "bf16",
        coords={"heads": batch * (kv if decode else q), "reach": reach, "group": q / kv},
        flops=4.0 * head_dim * q * pairs,
        cached=2.0 * head_dim * kv * keys * kv_bytes,
        new=tokens * head_dim * (2.0 * (2.0 * q + 2.0 * kv) + 2.0 * kv * kv_bytes),
        seconds=_column(frame, "latency") * 1e-3,
        kv_heads=None if decode else kv,
    )


def latent(folder: Path, gpu: str) -> Iterator[Rows]:
    """MLA kernels: absorbed in decode, expanded in prefill."""
    for part, table in (("prefill", "context_mla_perf"), ("decode", "generation_mla_perf")):
        for source in sources.tables(folder, "mla", table, gpu=gpu):
            for cache, frame in source.read().groupby("kv_cache_dtype"):
                yield _latent(source, part, str(cache), frame)


def latent_by_difference(folder: Path, gpu: str) -> Iterator[Rows]:
    """Absorbed kernels of engines whose whole module was measured, not the kernel: what the module takes more
    than at its shortest context, on top of what another engine's kernel takes there."""
    alone = {s.engine: s for s in sources.tables(folder, "mla", "generation_mla_perf", gpu=gpu)}
    shape = ["batch_size", "num_heads"]
    for source in sources.tables(folder, "mla", "mla_generation_module_perf", gpu=gpu):
        if source.engine in alone or not alone:
            continue
        kernel = next(iter(alone.values())).read()
        floor = kernel[kernel["step"] == kernel["step"].min()].groupby(shape)["latency"].median()
        frame = source.read()
        frame = frame[frame["gemm_type"] == "bfloat16"]
        for cache, mine in frame.groupby("kv_cache_dtype"):
            shortest = mine[mine["step"] == mine["step"].min()].groupby(shape)["latency"].median()
            mine = mine.join((floor - shortest).rename("around"), on=shape).dropna(subset=["around"])
            grown = mine.assign(latency=mine["latency"] + mine["around"], step=mine["step"] - 1)
            grown = grown[grown["latency"] > 0]
            rows = _latent(source, "decode", str(cache), grown)
            text = f"{rows.source}, module less module at its shortest context"
            yield replace(rows, key={**rows.key, "of": "module"}, source=text)


def _latent(source: sources.Source, part: str, cache: str, frame: Any) -> Rows:
    batch, heads, kv_bytes = _column(frame, "batch_size"), _column(frame, "num_heads"), _cache_bytes(cache)
    written = (_RANK + _ROTARY) * kv_bytes
    if part == "decode":
        reach = _column(frame, "step") + 1.0
        coords = {"heads": batch, "reach": reach, "group": heads}
        flops = 2.0 * heads * (2 * _RANK + _ROTARY) * batch * reach
        cached = batch * reach * written
        new = batch * (written + heads * (2 * _RANK + _ROTARY) * 2.0)
    else:
        reach, wide = _column(frame, "isl"), heads * (_PLAIN + _ROTARY + _VALUE)
        coords = {"heads": batch * heads, "reach": reach, "group": np.ones_like(heads)}
        flops = 2.0 * wide * batch * reach * (reach + 1) / 2
        cached = batch * reach * wide * 2.0
        new = batch * reach * (wide * 2.0 + written)
    return Rows(
        name=f"{part} mla {source.engine} {cache}",
        key={"op": "latent", "part": part, "engine": source.engine, "kv_bytes": kv_bytes, "of": "kernel"},
        source=_text(source, frame),
        precision="bf16",
        coords=coords,
        flops=flops,
        cached=cached,
        new=new,
        seconds=_column(frame, "latency") * 1e-3,
    )


def absorbed(folder: Path, gpu: str) -> Iterator[Rows]:
    """MLA's two products absorbed into queries and results, in bf16, as one."""
    for source in sources.tables(folder, "mla_bmm", "mla_bmm_perf", gpu=gpu):
        frame = source.read()
        frame = frame[frame["bmm_dtype"] == "bfloat16"]
        shape = ["num_tokens", "num_heads"]
        both = frame.groupby([*shape, "op_name"])["latency"].median().unstack().dropna()
        tokens, heads = (both.index.get_level_values(c).to_numpy(float) for c in shape)
        weights = heads * _RANK * (_PLAIN + _VALUE)
        yield Rows(
            name=f"absorbed {source.engine}",
            key={"op": "absorbed", "engine": source.engine},
            source=_text(source, frame),
            precision="bf16",
            coords={"tokens": tokens, "heads": heads},
            flops=2.0 * tokens * weights,
            cached=weights * 2.0,
            new=np.zeros_like(tokens),
            seconds=both.sum(axis=1).to_numpy(float) * 1e-3,
        )


def linear(folder: Path, gpu: str) -> Iterator[Rows]:
    """The gated delta rule and the short convolution before it."""
    for source in sources.tables(folder, "linear_attention", "gdn_perf", gpu=gpu):
        frame = source.read()
        convolves = frame["kernel_source"].str.startswith("causal_conv1d")
        for op, of_op in (("convolution", frame[convolves]), ("rule", frame[~convolves])):
            for part, phase in (("prefill", "context"), ("decode", "generation")):
                mine = of_op[of_op["phase"] == phase]
                if len(mine):
                    yield _linear(source, op, part, mine)


def _linear(source: sources.Source, op: str, part: str, frame: Any) -> Rows:
    frame = frame[frame["kernel_source"] == frame["kernel_source"].mode()[0]]
    batch, keys, values = (_column(frame, c) for c in ("batch_size", "num_k_heads", "num_v_heads"))
    reach = _column(frame, "seq_len") if part == "prefill" else np.ones_like(batch)
    rule = op == "rule"
    heads = batch * (values if rule else keys if _one_width(frame) else 2.0 * keys + values)
    state = _STATE * _STATE if rule else (_TAPS - 1) * BLOCK
    flops, cached, new = linear_work(
        rule, heads, reach, (7.0 if rule else 2.0 * _TAPS / (_TAPS - 1)) * state, state
    )
    return Rows(
        name=f"{part} {op} {source.engine}",
        key={"op": op, "part": part, "engine": source.engine},
        source=_text(source, frame),
        precision="bf16",
        coords={"heads": heads, "reach": reach},
        flops=flops,
        cached=cached,
        new=new,
        seconds=_column(frame, "latency") * 1e-3,
    )


def _one_width(frame: Any) -> bool:
    """Whether a convolution takes as long for many value heads as for few: some benchmarks ran the channels
    of the keys alone, whatever model they name. Rows that take twice the shortest time can tell."""
    widest = frame.sort_values("num_v_heads").groupby(["batch_size", "seq_len", "num_k_heads"])
    few, many = widest.first(), widest.last()
    telling = (few["latency"] > 2.0 * frame["latency"].min()) & (
        many["num_v_heads"] >= 2 * few["num_v_heads"]
    )
    grown = (many["latency"] / few["latency"])[telling]
    return bool(len(grown) and grown.median() < _GROWN)


def _column(frame: Any, name: str) -> Array:
    found: Array = frame[name].to_numpy(dtype=np.float64)
    return found


def _cache_bytes(name: str) -> float:
    return 1.0 if name == "fp8" else 2.0


def _text(source: sources.Source, frame: Any) -> str:
    return f"{sources.SOURCE}, {source.engine} {source.version}, {frame['kernel_source'].iloc[0]}"
