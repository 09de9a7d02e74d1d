"""Mixed formats: the front equals brute force, sums of parts are what engines take, plans keep the budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.memory import weight_bytes
from planc.cost_model.parts import split
from planc.cost_model.sensitivities import Measured, Sensitivities
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.errors import InvalidField
from planc.planner.candidates import candidates
from planc.planner.check import check
from planc.planner.compile import plan
from planc.planner.formats import Accuracy, accuracy
from planc.planner.inventory import groups
from planc.planner.mixtures import Choice, assigned, choices_of, front
from planc.planner.request import Request, load_request
from planc.planner.traffic import traffic
from tests.planner.cases import planned, request, table

_CHOICE = st.builds(
    Choice,
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 40).map(float),
    st.integers(0, 20).map(lambda n: n / 1024),
)
_PARTS = st.lists(st.lists(_CHOICE, min_size=1, max_size=4), min_size=1, max_size=6)


@given(_PARTS, st.integers(0, 60).map(lambda n: n / 1024))
def test_the_front_is_that_of_all_assignments(parts: list[list[Choice]], budget: float) -> None:
    every = {
        (sum(choice.cost for choice in picked), sum(choice.drop for choice in picked))
        for picked in product(*parts)
    }
    within = {(cost, drop) for cost, drop in every if drop <= budget}
    best = sorted(
        (drop, cost)
        for cost, drop in within
        if not any((c <= cost and d <= drop) and (c, d) != (cost, drop) for c, d in within)
    )
    found = front(parts, budget)
    assert [(one.drop, one.cost) for one in found] == best
    for one in found:
        assert len(one.schemes) == len(parts)


SCHEMES = [("fp8", "fp8"), ("w4a16", "bf16"), ("bf16", "bf16")]
H100, VLLM = catalogue.gpu("h100_sxm"), catalogue.engine("vllm")


@pytest.mark.parametrize(("name", "schemes"), [("llama8b", SCHEMES), ("qwen235b", SCHEMES[:2])])
def test_the_best_assignment_is_the_best_of_all_engines(name: str, schemes: list[tuple[str, str]]) -> None:
    """Every assignment is made an engine and priced as one: none within the budget decodes a batch of 64
    faster than the front's last, and its kernels take what its parts were said to."""
    model = table(name)
    (group,) = groups(request(inventory={"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 8}]}))
    shape = EngineShape("vllm", "h100_sxm", tp=8)
    losses, budget = Accuracy(model), 0.005
    choices = choices_of(losses, shape, group, VLLM, schemes, ["bf16"])[2]
    best = front(choices, budget)[-1]
    least = None
    for picked in product(*choices):
        (weights, activations, kv), exceptions = assigned(losses.parts, [one.scheme for one in picked])
        if losses.of((weights, activations, kv), exceptions) > budget + 1e-9:
            continue
        made = replace(shape, weights=weights, activations=activations, kv=kv, formats=exceptions)
        seconds = kernels(StepModel(model, made, H100, Fabric(8), VLLM))
        if least is None or seconds < least:
            least = seconds
        if tuple(one.scheme for one in picked) == best.schemes:
            mine = seconds
    assert mine == pytest.approx(least, rel=1e-6)


def kernels(model: StepModel) -> float:
    return sum(float(each[0]) for _, each in model.kernel_seconds(StepLoad([64], 2000)))


def test_outer_layers_stay_wide_where_it_makes_no_difference() -> None:
    losses = Accuracy(table())
    (group,) = groups(request(inventory={"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 1}]}))
    shape = EngineShape("vllm", "h100_sxm")
    choices = choices_of(losses, shape, group, VLLM, [("bf16", "bf16"), ("w4a16", "bf16")], ["bf16"])[0]
    usual, exceptions = assigned(losses.parts, front(choices, 0.005)[-1].schemes)
    assert usual == ("bf16", "bf16", "bf16")
    assert exceptions == (("block[8-23]:mlp", "w4a16/bf16"), ("block[8-23]:self_attn", "w4a16/bf16"))


def test_losses_of_parts_add_up_to_that_of_everything() -> None:
    losses = Accuracy(table("deepseek_v3"))
    for formats in [("w4a16", "bf16", "bf16"), ("nvfp4", "nvfp4", "fp8")]:
        weights, activations, kv = formats
        parts = sum(
            losses.of_part(part, kv if part.cached else f"{weights}/{activations}") for part in losses.parts
        )
        assert parts == pytest.approx(losses.uniform(formats))


def mixed(**constraints: Any) -> Request:
    """Room for a budget between fp8 everywhere and four bits everywhere."""
    return request(
        inventory={"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 2}]},
        workload={"isl": 500, "osl": 200, "request_rate": 1},
        slo={},
        objective="min_latency",
        constraints={
            "weights": ["bf16", "w4a16"],
            "kv": ["bf16"],
            "max_num_seqs": [32],
            "max_num_batched_tokens": [2048],
            **constraints,
        },
    )


def test_a_budget_between_formats_gives_a_mixed_plan() -> None:
    """Without a budget nothing is mixed; with one the plan is faster than the best of one format that keeps
    it, loses no more than it may, and its layers say what each part takes."""
    asked = mixed(max_accuracy_drop=0.009)
    found = plan(asked, table())
    wide = plan(mixed(weights=["bf16"]), table())
    (replica, *_) = found.replicas()
    assert replica.formats
    assert not check(found, table(), asked)
    assert found.predicted["tpot_ms"].value < 0.9 * wide.predicted["tpot_ms"].value
    losses = accuracy(asked, table())
    taken = (replica.weights, replica.activations, replica.kv)
    assert 0 < losses.of(taken, tuple(sorted(replica.formats.items()))) <= 0.009 + 1e-9
    (block,) = (layer for layer in found.layers if layer.layer_class == "block")
    assert {block.decisions.format, *block.decisions.formats.values()} in (
        {"w4a16", "bf16/bf16"},
        {"bf16", "w4a16/bf16"},
    )
    assert '"formats": {' not in wide.canonical()


def test_nothing_is_mixed_without_a_budget_or_where_one_format_fits() -> None:
    for constraints in ({}, {"max_accuracy_drop": 0.02}, {"max_accuracy_drop": 0.0}):
        asked = mixed(**constraints)
        found, _ = candidates(table(), groups(asked), asked.constraints, (), traffic(asked, "causal_lm"))
        assert not any(candidate.shape.formats for candidate in found), constraints


def test_plans_of_one_format_say_nothing_of_parts() -> None:
    assert '"formats": {' not in planned().canonical()
    assert '"layers": ""' not in planned().canonical()


def measured(**drops: float) -> Sensitivities:
    """The last quarter of the layers is a hundred times as sensitive as the others."""
    parts = []
    for module in ("self_attn", "mlp"):
        for first in range(0, 32, 8):
            kl = 1e-2 if first == 24 else 1e-4
            name = f"block[{first}-{first + 7}]:{module}"
            parts.append(Measured(part=name, scheme="w4a16/bf16", kl=kl, error=kl))
    return Sensitivities(model="llama", tokens=100, parts=tuple(parts), drops=drops)


def test_measured_sensitivities_keep_sensitive_layers_wide(tmp_path: Path) -> None:
    measured().save(tmp_path / "measured.json")
    (tmp_path / "request.yaml").write_text(
        mixed(max_accuracy_drop=0.001, sensitivities="measured.json").model_dump_json(exclude_none=True)
    )
    asked = load_request(tmp_path / "request.yaml")
    found = plan(asked, table())
    (replica, *_) = found.replicas()
    assert not check(found, table(), asked)
    assert (replica.weights, set(replica.formats.values())) == ("w4a16", {"bf16/bf16"})
    assert set(replica.formats) == {"block[24-31]:self_attn", "block[24-31]:mlp"}
    (band,) = (layer for layer in found.layers if layer.layer_class == "block[24-31]")
    assert (band.count, band.layers, band.decisions.format) == (8, "24-31", "bf16")
    assert asked.fingerprint() != mixed(max_accuracy_drop=0.001).fingerprint()


def test_sensitivities_of_another_model_are_refused(tmp_path: Path) -> None:
    measured().save(tmp_path / "measured.json")
    asked = mixed(max_accuracy_drop=0.001, sensitivities=str(tmp_path / "measured.json"))
    with pytest.raises(InvalidField, match="no such part"):
        plan(asked, table("deepseek_v3"))


def test_stated_formats_are_in_every_engine() -> None:
    asked = mixed(weights=["bf16"], formats={"block:mlp": "w4a16/bf16"})
    (replica, *_) = plan(asked, table()).replicas()
    assert (replica.weights, replica.formats) == ("bf16", {"block:mlp": "w4a16/bf16"})
    cut = split(table(), tuple(replica.formats.items()))
    counts = tuple(cls.count for cls in cut.classes)
    shape = EngineShape("vllm", "h100_sxm", formats=tuple(replica.formats.items()))
    assert replica.memory.weights_gib * replica.tp == pytest.approx(
        weight_bytes(cut, shape, counts) / 2**30, rel=0.02
    )


def test_half_of_the_cache_in_half_the_bytes() -> None:
    wide = plan(mixed(weights=["bf16"]), table())
    asked = mixed(weights=["bf16"], formats={"block[0-15]:kv": "fp8"})
    found = plan(asked, table())
    assert not check(found, table(), asked)
    assert found.model.kv_bytes_per_token == 0.75 * wide.model.kv_bytes_per_token
    blocks = [one.replicas()[0].kv_blocks for one in (wide, found)]
    assert blocks[1] == pytest.approx(blocks[0] / 0.75, rel=0.01)


@pytest.mark.parametrize(
    ("formats", "words"),
    [({"block": "fp8"}, "no part of a model"), ({"block:mlp": "fp9"}, "fp9")],
)
def test_formats_that_cannot_be_are_refused(formats: dict[str, str], words: str) -> None:
    from planc.errors import PlancError

    with pytest.raises(PlancError, match=words):
        mixed(formats=formats)
