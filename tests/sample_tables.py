"""Analytic cost tables of well-known architectures: an oracle beside traced ones, input for tests.

Written down from the architectures' papers, by hand, with no tracing: Llama (arXiv 2407.21783), a
generic mixture of experts (Mixtral, Qwen3-MoE), and DeepSeek-V3's multi-head latent attention
(arXiv 2412.19437) with absorbed projections in decode.
"""

from __future__ import annotations

from dataclasses import replace

from planc.cost_model.table import CostTable, FusionOffer, LayerClass, ModelFacts, Row, Shard
from planc.ir.work import NONE, Amount, Work

#: logits are of one row per sequence
HEAD_ROWS = "S"


def linear(
    name: str, layer: str, k: int, n: int, *, kind: str, units: int, rows: str = "T", after: str = ""
) -> Row:
    """One projection [rows, k] @ [k, n]; `after` names the collective that follows, if any."""
    work = Work(
        family="gemm",
        flops=Amount({rows: 2.0 * k * n}),
        weights=k * n,
        reads=Amount({rows: float(k)}),
        writes=Amount({rows: float(n)}),
        dims={"k": k, "n": n},
    )
    moved = Amount({rows: float(n)}) if after else NONE
    shard = Shard(kind, units, 0, after or None, moved)  # type: ignore[arg-type]
    return Row(layer, name, "aten::linear", 1, work, shard, ("weight", "activation"))


def pointwise(
    name: str, layer: str, reads: int, writes: int, op: str, *, kind: str = "replicated", units: int = 0
) -> Row:
    work = Work("elementwise", reads=Amount({"T": float(reads)}), writes=Amount({"T": float(writes)}))
    return Row(layer, name, op, 1, work, Shard(kind, units))  # type: ignore[arg-type]


def attention(layer: str, heads: int, kv_heads: int, head_dim: int, span: str) -> Row:
    """Grouped-query attention with its cache write."""
    kv = 2.0 * kv_heads * head_dim
    work = Work(
        family="attention",
        flops=Amount({f"P:{span}": 4.0 * heads * head_dim}),
        reads=Amount({"T": heads * head_dim + kv}),
        writes=Amount({"T": float(heads * head_dim)}),
        kv_reads=Amount({f"K:{span}": kv}),
        kv_writes=Amount({"T": kv}),
        dims={"q_heads": heads, "kv_heads": kv_heads, "qk_dim": head_dim, "v_dim": head_dim, "latent": 0},
    )
    return Row(
        layer, "self_attn", "planc::paged_attention", 1, work, Shard("heads", heads, kv_heads), ("kv",)
    )


def _self_attention(
    layer: str, hidden: int, heads: int, kv_heads: int, head_dim: int, span: str
) -> list[Row]:
    q, kv = heads * head_dim, kv_heads * head_dim
    return [
        pointwise("input_layernorm", layer, hidden, hidden, "planc::rms_norm"),
        linear("self_attn.q_proj", layer, hidden, q, kind="column", units=heads),
        linear("self_attn.k_proj", layer, hidden, kv, kind="column", units=kv_heads),
        linear("self_attn.v_proj", layer, hidden, kv, kind="column", units=kv_heads),
        pointwise("self_attn.rotary", layer, q + kv, q + kv, "planc::rotary", kind="heads"),
        attention(layer, heads, kv_heads, head_dim, span),
        linear("self_attn.o_proj", layer, q, hidden, kind="row", units=heads, after="all_reduce"),
        pointwise("attn_residual", layer, 2 * hidden, hidden, "aten::add"),
        pointwise("post_attention_layernorm", layer, hidden, hidden, "planc::rms_norm"),
    ]


def _mlp(layer: str, hidden: int, width: int, prefix: str = "mlp") -> list[Row]:
    return [
        linear(f"{prefix}.gate_proj", layer, hidden, width, kind="column", units=width),
        linear(f"{prefix}.up_proj", layer, hidden, width, kind="column", units=width),
        pointwise(f"{prefix}.act", layer, 2 * width, width, "planc::silu_mul", kind="column", units=width),
        linear(f"{prefix}.down_proj", layer, width, hidden, kind="row", units=width, after="all_reduce"),
        pointwise("mlp_residual", layer, 2 * hidden, hidden, "aten::add"),
    ]


def _experts(layer: str, hidden: int, width: int, experts: int, top_k: int) -> list[Row]:
    weights = 3 * hidden * width * experts
    work = Work(
        family="grouped_gemm",
        flops=Amount({"T": 2.0 * 3 * hidden * width * top_k}),
        weights=weights,
        reads=Amount({"T": float(top_k * (hidden + width))}),
        writes=Amount({"T": float(top_k * (2 * width + hidden))}),
        dims={"experts": experts, "top_k": top_k, "k": hidden, "n": 2 * width, "matrices": 3},
    )
    shard = Shard("experts", experts, 0, "all_reduce", Amount({"T": float(hidden)}))
    return [
        replace(linear("mlp.gate", layer, hidden, experts, kind="replicated", units=0), quantizable=()),
        Row(layer, "mlp.experts", "planc::moe", 1, work, shard, ("weight", "activation")),
        pointwise("mlp_residual", layer, 2 * hidden, hidden, "aten::add"),
    ]


def _ends(hidden: int, vocab: int) -> tuple[list[Row], list[Row]]:
    gather = Work(
        "gather",
        reads=Amount({"T": 1.0 * hidden}),
        writes=Amount({"T": 1.0 * hidden}),
    )
    embed = Row(
        "embedding",
        "embed_tokens",
        "aten::embedding",
        1,
        gather,
        Shard("vocab", vocab, 0, "all_reduce", Amount({"T": 1.0 * hidden})),
    )
    return [embed], [
        pointwise("norm", "head", hidden, hidden, "planc::rms_norm"),
        replace(
            linear(
                "lm_head",
                "head",
                hidden,
                vocab,
                kind="vocab",
                units=vocab,
                rows=HEAD_ROWS,
                after="all_gather",
            ),
            quantizable=(),
        ),
    ]


def _offers(layer: str) -> tuple[FusionOffer, ...]:
    return (
        FusionOffer("qkv_merge", layer, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 2),
        FusionOffer("gate_up_merge", layer, ("mlp.gate_proj", "mlp.up_proj"), 1),
        FusionOffer("residual_add_rms_norm", layer, ("attn_residual", "post_attention_layernorm"), 1),
    )


def _table(
    name: str,
    classes: list[LayerClass],
    rows: list[Row],
    hidden: int,
    vocab: int,
    heads: int,
    kv_heads: int,
    active: int,
    **facts: object,
) -> CostTable:
    layers = sum(c.count for c in classes if c.layers)
    parameters = sum(c.count * c.parameters for c in classes)
    model = ModelFacts(
        name,
        "",
        "",
        "causal_lm",
        parameters,
        active or parameters,
        str(facts.pop("native", "bf16")),
        hidden,
        layers,
        vocab,
        131072,
        heads,
        kv_heads,
        **facts,  # type: ignore[arg-type]
    )
    offers = tuple(offer for c in classes if c.layers for offer in _offers(c.name))
    return CostTable(
        model, f"sample-{name}", tuple(classes), {"prefill": tuple(rows), "decode": tuple(rows)}, offers
    )


def _class(name: str, layers: range, rows: list[Row], norms: int, **kv: object) -> LayerClass:
    weights = sum(r.work.weights * r.calls for r in rows if r.layer_class == name)
    return LayerClass(name, max(len(layers), 1), tuple(layers), weights + norms, **kv)  # type: ignore[arg-type]


def dense_table(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    width: int,
    vocab: int,
    *,
    head_dim: int = 0,
    span: str = "full",
    name: str = "dense",
) -> CostTable:
    """A Llama-like dense decoder."""
    head_dim = head_dim or hidden // heads
    first, last = _ends(hidden, vocab)
    block = _self_attention("block", hidden, heads, kv_heads, head_dim, span) + _mlp("block", hidden, width)
    rows = [*first, *block, *last]
    classes = [
        _class("embedding", range(0), rows, vocab * hidden),
        _class(
            "block",
            range(layers),
            rows,
            2 * hidden,
            kv_elements=2 * kv_heads * head_dim,
            kv_span=span,
            kv_units=kv_heads,
        ),
        _class("head", range(0), rows, hidden),
    ]
    return _table(name, classes, rows, hidden, vocab, heads, kv_heads, 0)


def llama70b() -> CostTable:
    return dense_table(80, 8192, 64, 8, 28672, 128256, name="llama-3.1-70b")


def llama8b() -> CostTable:
    return dense_table(32, 4096, 32, 8, 14336, 128256, name="llama-3.1-8b")


def qwen32b() -> CostTable:
    return dense_table(64, 5120, 64, 8, 25600, 151936, head_dim=128, name="qwen3-32b")


def moe_table(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    width: int,
    experts: int,
    top_k: int,
    vocab: int,
    *,
    name: str = "moe",
    span: str = "full",
) -> CostTable:
    """A mixture of experts in every layer (Mixtral, Qwen3-MoE)."""
    first, last = _ends(hidden, vocab)
    block = _self_attention("block", hidden, heads, kv_heads, head_dim, span) + _experts(
        "block", hidden, width, experts, top_k
    )
    rows = [*first, *block, *last]
    classes = [
        _class("embedding", range(0), rows, vocab * hidden),
        _class(
            "block",
            range(layers),
            rows,
            2 * hidden,
            kv_elements=2 * kv_heads * head_dim,
            kv_span=span,
            kv_units=kv_heads,
        ),
        _class("head", range(0), rows, hidden),
    ]
    idle = layers * 3 * hidden * width * (experts - top_k)
    parameters = sum(c.count * c.parameters for c in classes)
    return _table(
        name, classes, rows, hidden, vocab, heads, kv_heads, parameters - idle, experts=experts, top_k=top_k
    )


def _latent_attention(layer: str) -> list[Row]:
    hidden, heads, nope, rope, v_dim, q_rank, rank = 7168, 128, 128, 64, 128, 1536, 512
    query = heads * (nope + rope)
    kv_b = heads * (nope + v_dim) * rank

    def attend(flops: dict[str, float]) -> Row:
        entry = float(rank + rope)
        work = Work(
            family="attention",
            flops=Amount(flops),
            weights=kv_b,
            reads=Amount({"T": query + entry}),
            writes=Amount({"T": float(heads * v_dim)}),
            kv_reads=Amount({"K:full": entry}),
            kv_writes=Amount({"T": entry}),
            dims={"q_heads": heads, "kv_heads": 1, "qk_dim": nope + rope, "v_dim": v_dim, "latent": 1},
        )
        shard = Shard("heads", heads, 0)
        return Row(layer, "self_attn", "planc::paged_mla", 1, work, shard, ("kv",))

    expanded = attend({"P:full": 2.0 * heads * (nope + rope + v_dim), "K:full": 2.0 * kv_b})
    absorbed = attend({"P:full": 2.0 * heads * (2 * rank + rope), "T": 2.0 * kv_b})
    around = [
        pointwise("input_layernorm", layer, hidden, hidden, "planc::rms_norm"),
        linear("self_attn.q_a_proj", layer, hidden, q_rank, kind="replicated", units=0),
        linear("self_attn.q_b_proj", layer, q_rank, query, kind="column", units=heads),
        linear("self_attn.kv_a_proj", layer, hidden, rank + rope, kind="replicated", units=0),
        linear("self_attn.o_proj", layer, heads * v_dim, hidden, kind="row", units=heads, after="all_reduce"),
        pointwise("attn_residual", layer, 2 * hidden, hidden, "aten::add"),
        pointwise("post_attention_layernorm", layer, hidden, hidden, "planc::rms_norm"),
    ]
    return [*around, expanded, absorbed]


def deepseek_v3() -> CostTable:
    """DeepSeek-V3/R1: 3 dense layers and 58 of 256 + 1 experts, latent attention in all 61."""
    hidden, vocab = 7168, 129280
    first, last = _ends(hidden, vocab)
    blocks = []
    for layer, tail in (
        ("dense", _mlp("dense", hidden, 18432)),
        ("sparse", [*_experts("sparse", hidden, 2048, 256, 8), *_mlp("sparse", hidden, 2048, "mlp.shared")]),
    ):
        blocks += [*_latent_attention(layer), *tail]
    rows = [*first, *blocks, *last]
    prefill = [r for r in rows if r.op != "planc::paged_mla" or "K:full" in r.work.flops.terms]
    decode = [r for r in rows if r.op != "planc::paged_mla" or "T" in r.work.flops.terms]
    kv: dict[str, object] = {"kv_elements": 576, "kv_span": "full"}
    norms = 2 * hidden + 1536 + 512
    classes = [
        _class("embedding", range(0), prefill, vocab * hidden),
        _class("dense", range(3), prefill, norms, **kv),
        _class("sparse", range(3, 61), prefill, norms + 256, **kv),
        _class("head", range(0), prefill, hidden),
    ]
    idle = 58 * 3 * hidden * 2048 * (256 - 8)
    active = sum(c.count * c.parameters for c in classes) - idle
    table = _table(
        "deepseek-r1", classes, prefill, hidden, vocab, 128, 128, active, native="fp8", experts=256, top_k=8
    )
    return replace(table, rows={"prefill": tuple(prefill), "decode": tuple(decode)})


def qwen235b() -> CostTable:
    return moe_table(94, 4096, 64, 4, 128, 1536, 128, 8, 151936, name="qwen3-235b-a22b")
