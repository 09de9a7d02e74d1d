"""Caches over cp of the tp ranks: what kernels do, what is exchanged, what memory holds, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from planc.cost_model import catalogue, exchanges
from planc.cost_model.kernels import Attention
from planc.cost_model.memory import memory_map
from planc.cost_model.rank_ops import Kernel
from planc.cost_model.roofline import Roofline
from planc.cost_model.shape import EngineShape, handover_refusals, refusals
from planc.cost_model.step import StepLoad, StepModel
from tests.sample_tables import deepseek_v3, llama8b, qwen235b

H200 = catalogue.gpu("h200_sxm")
VLLM = catalogue.engine("vllm")
LATENT = EngineShape("vllm", "h200_sxm", tp=8, ep=8, weights="fp8", activations="fp8")
HEADS = EngineShape("vllm", "h200_sxm", tp=8, ep=8)

Make = Callable[..., StepModel]


def attention(model: StepModel, part: str) -> Kernel:
    return next(k for k in model.layers.kernels if isinstance(k.spec, Attention) and k.part == part)


def exchanged(shape: EngineShape, table: object) -> dict[tuple[str, str], list[dict[str, float]]]:
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for one in exchanges.collectives(table, shape):  # type: ignore[arg-type]
        if one.ranks == shape.cp and one.site == "self_attn" and one.layer_class != "dense":
            found.setdefault((one.part, one.kind), []).append(dict(one.size.terms))
    return found


def test_a_rank_attends_for_all_ranks_to_its_share_of_the_keys(model: Make) -> None:
    """The same operations, an eighth of the cache."""
    costs = Roofline(H200)
    alone, spread = (
        model(deepseek_v3(), "h200_sxm", tp=8, ep=8, weights="fp8", activations="fp8", cp=cp, costs=costs)
        for cp in (1, 8)
    )
    load = StepLoad(64, 80_000)
    one, many = (
        next(p for p in m.breakdown(load) if p.op == "planc::paged_mla" and p.layer_class == "sparse")
        for m in (alone, spread)
    )
    assert one.done
    assert many.done
    assert many.done.flops == pytest.approx(one.done.flops, rel=1e-6)
    assert many.done.nbytes == pytest.approx(one.done.nbytes / 8, rel=0.1)
    spec = attention(spread, "decode").spec
    assert isinstance(spec, Attention)
    assert (spec.q_heads, spec.kv_heads, spec.gathered) == (128, 1, 8)
    prefill = attention(spread, "prefill").spec
    assert isinstance(prefill, Attention)
    assert (prefill.q_heads, prefill.gathered) == (16, 1)


def test_latent_caches_gather_queries_to_decode_and_entries_to_prefill() -> None:
    shape = replace(LATENT, cp=4)  # 16 heads of a rank, 64 of the group; entries of 576, latents of 512
    assert exchanged(shape, deepseek_v3()) == {
        ("decode", "all_gather"): [{"T": 64 * 576 * 2.0}, {"T": 64 * 4 * 4.0}],
        ("decode", "reduce_scatter"): [{"T": 64 * 512 * 2.0}],
        ("prefill", "all_gather"): [{"K:full": 576 * 2.0, "T": -576 * 2.0}],
    }


def test_keys_and_values_exchange_queries_and_results_of_all_tokens() -> None:
    shape = replace(HEADS, cp=2)  # 8 of 64 heads on a rank, 16 of the group, 128 wide
    assert exchanged(shape, qwen235b()) == {
        ("step", "all_gather"): [{"T": 16 * 128 * 2.0}, {"T": 16 * 2 * 4.0}],
        ("step", "reduce_scatter"): [{"T": 16 * 128 * 2.0}],
    }


def test_it_takes_longer_where_contexts_are_short_and_less_where_they_are_long(model: Make) -> None:
    alone, spread = (
        model(deepseek_v3(), "h200_sxm", tp=8, ep=8, weights="fp8", activations="fp8", cp=cp) for cp in (1, 8)
    )
    for batch, context, faster in (
        (1, 1000, False),
        (32, 1000, False),
        (32, 64_000, True),
        (8, 128_000, True),
    ):
        load = StepLoad(batch, context)
        assert (float(spread.seconds(load)) < float(alone.seconds(load))) is faster
    prompt = StepLoad(0, 0, 8192, 1, 60_000)  # computed as before, after cached entries were gathered
    assert 1.0 < float(spread.seconds(prompt)) / float(alone.seconds(prompt)) < 1.05


def test_memory_holds_as_many_more_tokens_less_what_is_gathered() -> None:
    def held(cp: int) -> tuple[float, float, int]:
        shape, limits = replace(LATENT, cp=cp), {"max_num_seqs": 32, "max_num_batched_tokens": 4096}
        found = memory_map(deepseek_v3(), shape, H200, VLLM, max_model_len=100_000, **limits)
        return found.kv_bytes_per_token, found.activations, found.kv_tokens * cp

    (per_token, activations, tokens), (same, more, most) = held(1), held(8)
    assert same == per_token == pytest.approx(61 * 576 * 2)
    assert more >= activations  # of the widest op: buffers of experts, or of all ranks' queries
    assert 7 * tokens < most <= 8 * tokens


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("latent", {"cp": 8}, ""),
        ("latent", {"cp": 3}, "tp = 8 ranks do not divide into groups of 3"),
        ("heads", {"cp": 2}, ""),
        ("heads", {"cp": 4}, "4 KV heads have 2 copies on 8 ranks"),
        ("heads", {"cp": 4, "tp": 16, "ep": 16}, ""),
        ("sglang", {"cp": 2}, "spreads no cache of heads"),
    ],
)
def test_what_is_refused_says_why(name: str, changes: dict[str, int], reason: str) -> None:
    engine = "sglang" if name == "sglang" else "vllm"
    shape, table = (LATENT, deepseek_v3()) if name == "latent" else (HEADS, qwen235b())
    found = refusals(replace(shape, engine=engine, **changes), table, H200, catalogue.engine(engine))
    assert [r.field for r in found] == (["cp"] if reason else [])
    assert reason in "".join(r.reason for r in found)


def test_layers_that_forget_keep_their_caches_whole() -> None:
    table = llama8b()
    windowed = tuple(replace(cls, kv_span="w4096") if cls.kv_elements else cls for cls in table.classes)
    shape = EngineShape("vllm", "h200_sxm", tp=16, cp=2)
    assert refusals(shape, table, H200, VLLM) == []
    (refusal,) = refusals(shape, replace(table, classes=windowed), H200, VLLM)
    assert "all tokens are attended to" in refusal.reason


@pytest.mark.parametrize(
    ("engine", "role", "cp", "allowed"),
    [
        ("vllm", "aggregated", 2, True),
        ("vllm", "decode", 8, True),
        ("vllm", "decode", 4, False),  # handed over from all tp ranks or none
        ("trtllm", "decode", 4, True),
        ("trtllm", "aggregated", 4, False),
        ("sglang", "decode", 8, False),
    ],
)
def test_pools_that_may(engine: str, role: str, cp: int, allowed: bool) -> None:
    shape = replace(LATENT, engine=engine, cp=cp)
    found = handover_refusals(shape, deepseek_v3(), catalogue.engine(engine), role)
    assert (found == []) is allowed
    assert {refusal.field for refusal in found} <= {"cp"}


def test_keys_and_values_that_are_spread_are_not_handed_over() -> None:
    found = handover_refusals(replace(HEADS, cp=2), qwen235b(), VLLM, "decode")
    assert "hands over no such cache" in found[0].reason
