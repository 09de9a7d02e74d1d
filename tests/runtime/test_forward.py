"""Graphs without phases: inputs from files, outputs, and their verification."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from planc.errors import FileMissing, FileUnreadable, InvalidField, UnknownField
from planc.ir.graph import Graph
from planc.ir.trace.module import trace_module
from planc.runtime.forward import random_inputs, read_inputs, run_module
from planc.runtime.verify import verify_module
from planc.runtime.weights import of_module


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids) * weight[:, None, None]
        return self.head(x.mean(1)), x


MODULE = Encoder()
IDS, WEIGHT = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1.0, 2.0])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace_module(MODULE, (IDS, WEIGHT))


def test_a_module_runs_on_named_inputs(graph: Graph) -> None:
    found = run_module(graph, of_module(MODULE), {"weight": WEIGHT, "ids": IDS})
    for a, b in zip(found, MODULE(IDS, WEIGHT), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("suffix", ["json", "pt", "npz", "safetensors"])
def test_inputs_from_files(graph: Graph, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"inputs.{suffix}"
    tensors = {"ids": IDS, "weight": WEIGHT}
    match suffix:
        case "json":
            path.write_text(json.dumps({k: v.tolist() for k, v in tensors.items()}))
        case "pt":
            torch.save(tensors, path)
        case "npz":
            np.savez(path, **{k: v.numpy() for k, v in tensors.items()})
        case _:
            save_file(tensors, path)
    found = read_inputs(graph, path)
    assert list(found) == ["ids", "weight"]
    assert torch.equal(found["ids"], IDS)
    assert found["weight"].dtype == torch.float32


def test_bad_inputs_are_explained(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    with pytest.raises(FileMissing):
        read_inputs(graph, path)
    for text in ("[1, 2]", "{", '{"ids": [[1], [2, 3]]}'):
        path.write_text(text)
        with pytest.raises(FileUnreadable):
            read_inputs(graph, path)
    path.write_text('{"idz": [[1]]}')
    with pytest.raises(UnknownField, match="ids, weight"):
        read_inputs(graph, path)
    path.write_text('{"ids": [[1]]}')
    with pytest.raises(InvalidField, match="weight = None"):
        read_inputs(graph, path)
    path.write_text('{"ids": [1], "weight": [1.0]}')
    with pytest.raises(InvalidField, match=r"\[\*, \*\]"):
        read_inputs(graph, path)


def test_verify_module(graph: Graph) -> None:
    """A graph agrees with itself; one whose last product has another weight does not."""
    same = verify_module(graph, graph, of_module(MODULE))
    assert same.compared == 2
    assert same.max_abs_error == 0.0
    assert same.scale > 0.0
    wrong = copy.deepcopy(graph)
    for node in wrong.module.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim):
        node.target = torch.ops.aten.sum.dim_IntList
    wrong.module.recompile()
    assert verify_module(graph, wrong, of_module(MODULE)).relative_error > 0.1


def test_random_inputs_fit(graph: Graph) -> None:
    made = random_inputs(graph)
    assert run_module(graph, of_module(MODULE), made)[0].shape == (made["ids"].shape[0], 3)
