"""Measured sensitivities: against runs made by hand, and what a search makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planc.cost_model.sensitivities import load
from planc.errors import FileUnreadable, InvalidField
from planc.ir.ops import quantized_formats as qf
from planc.passes.tabulate import tabulate
from planc.planner.formats import Accuracy
from planc.runtime.sensitivity import sensitivities
from tests.families import tiny_graph
from tests.passes.running import family_weights, run

PROMPTS = ([5, 9, 77, 12, 3, 8, 100, 31, 44, 2], [44, 2, 7, 150, 23])


@pytest.fixture(scope="module")
def llama() -> object:
    graph = tiny_graph("llama")
    return sensitivities(graph, family_weights("llama"), PROMPTS, schemes=("int8/bf16", "fp8/bf16"), bands=2)


def test_a_part_alone_is_what_its_rounded_weights_do(llama) -> None:  # type: ignore[no-untyped-def]
    graph, weights = tiny_graph("llama"), dict(family_weights("llama"))
    changed = dict(weights)
    for name, tensor in weights.items():
        if ".layers.0.mlp." in name and tensor.dim() == 2:
            kind = qf.WEIGHT_FORMATS["int8"]
            changed[name] = kind.dequantize(kind.quantize(tensor, 0), tensor.shape[-1], 0)
    found = [e for e in llama.parts if (e.part, e.scheme) == ("decoder[0]:mlp", "int8/bf16")]
    (exact, rounded) = (
        torch.cat([run(graph, w, torch.tensor([p]), torch.arange(len(p))[None])[0].float() for p in PROMPTS])
        for w in (weights, changed)
    )
    p, q = exact.softmax(-1), rounded.softmax(-1)
    kl = float((p * (p.log() - q.log())).sum(-1).mean())
    assert found[0].kl == pytest.approx(kl, rel=0.02)
    assert found[0].error == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=0.02)


def test_every_part_is_measured_and_finer_formats_hurt_less(llama) -> None:  # type: ignore[no-untyped-def]
    by = {(entry.part, entry.scheme): entry.kl for entry in llama.parts}
    assert {part for part, _ in by} == {f"decoder[{i}]:{m}" for i in (0, 1) for m in ("self_attn", "mlp")}
    assert all(by[part, "int8/bf16"] < by[part, "fp8/bf16"] for part, _ in by)


def test_they_share_out_the_loss_of_a_scheme(llama, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    llama.save(tmp_path / "s.json")
    table = tabulate(tiny_graph("llama"))
    accuracy = Accuracy(table, load(tmp_path / "s.json"))
    usual = ("bf16", "bf16", "bf16")
    parts = [f"decoder[{i}]:{m}" for i in (0, 1) for m in ("self_attn", "mlp")]
    each = {part: accuracy.of(usual, ((part, "fp8/bf16"),)) for part in parts}
    assert sum(each.values()) == pytest.approx(accuracy.uniform(("fp8", "bf16", "bf16")))
    kls = {entry.part: entry.kl for entry in llama.parts if entry.scheme == "fp8/bf16"}
    assert sorted(each, key=each.__getitem__) == sorted(kls, key=kls.__getitem__)
    stated = llama.model_copy(update={"drops": {"fp8/bf16": 0.04}})
    assert Accuracy(table, stated).uniform(("fp8", "bf16", "bf16")) == pytest.approx(0.04)
    assert Accuracy(table, stated).of(usual, (("decoder:mlp", "fp8/bf16"),)) == pytest.approx(
        0.04 * sum(kl for part, kl in kls.items() if "mlp" in part) / sum(kls.values())
    )


def test_what_cannot_be_measured_or_read_is_said(tmp_path: Path) -> None:
    graph = tiny_graph("llama")
    with pytest.raises(InvalidField, match="tokens"):
        sensitivities(graph, family_weights("llama"), [[]])
    (tmp_path / "s.json").write_text('{"schema_version": 1, "model": "x"}')
    with pytest.raises(FileUnreadable, match="sensitivities"):
        load(tmp_path / "s.json")
    broken = '{"schema_version": 1, "model": "x", "tokens": 1, "parts": [%s]}'
    entry = '{"part": "nope", "scheme": "fp8/fp8", "kl": 0.1, "error": 0.1}'
    (tmp_path / "s.json").write_text(broken % entry)
    with pytest.raises(FileUnreadable, match="names no part"):
        load(tmp_path / "s.json")
