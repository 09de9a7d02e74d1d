"""The doors other than Hugging Face's: factories, modules, exported programs, symbolic traces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planc.errors import FileMissing, FileUnreadable, PlancError, TraceFailed, UnsupportedModel
from planc.ir.layers import layer_of, module_path
from planc.ir.trace import trace
from planc.ir.trace.module import trace_module
from planc.ir.verify import verify
from tests.ir.blocks import Block, Deciding, Remembering, small

HERE = "tests.ir.blocks"


def sizes(node: torch.fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_example_modules_give_their_own_numbers_at_other_batch_sizes(name: str) -> None:
    graph = trace(f"examples.modules.{name}:tiny")
    verify(graph, "trace", rerun=True)
    module = __import__(f"examples.modules.{name}", fromlist=["tiny"]).tiny()[0].eval()
    given = torch.randn(3, 3, 32, 32) if name == "convnet" else torch.randint(97, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(graph.module(given), module(given))


@pytest.mark.parametrize(
    ("factory", "parameters", "kind", "roles"),
    [
        ("convnet:resnet18", 11_689_512, "module", {"batch"}),
        pytest.param("encoder:base", 108_890_112, "encoder", {"batch", "seq"}, marks=pytest.mark.slow),
    ],
)
def test_modules_on_meta_are_traced_without_being_allocated(
    factory: str, parameters: int, kind: str, roles: set[str]
) -> None:
    graph = trace(f"examples.modules.{factory}")
    assert graph.source.kind == kind
    assert set(graph.symbols.values()) == roles
    assert sum(parameter.numel() for parameter in graph.module.parameters()) == parameters
    assert all(parameter.is_meta for parameter in graph.module.parameters())


def test_a_factory_in_a_file_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import torch\ndef make():\n    return torch.nn.Linear(3, 5), torch.zeros(1, 3)\n"
    (tmp_path / "mine.py").write_text(text)
    assert trace(f"{tmp_path}/mine.py:make").source.architecture == "Linear"
    monkeypatch.chdir(tmp_path)
    graph = trace("mine:make")
    given = torch.randn(4, 3)
    assert graph.module(given).shape == (4, 5)


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("tests.ir.no_such:make", TraceFailed, "there is no module 'tests.ir.no_such'"),
        (f"{HERE}:no_such", TraceFailed, "has no attribute 'no_such'"),
        (f"{HERE}:failing", TraceFailed, "the factory raised ValueError: no such checkpoint"),
        (f"{HERE}:wrong", UnsupportedModel, "the factory returned a str"),
        (f"{HERE}:NUMBER", UnsupportedModel, "it is a int"),
        (f"{HERE}:bare", TraceFailed, "no example inputs"),
        ("no/such/file.py:make", FileMissing, "no/such/file.py"),
        ("no/such/config.json", FileMissing, "no/such/config.json"),
        ("no/such.pt2", FileMissing, "no/such.pt2"),
        ("llama", FileMissing, "Name a Hugging Face config.json"),
    ],
)
def test_mistakes_in_naming_a_model_have_one_clear_message(
    source: str, error: type[PlancError], said: str
) -> None:
    with pytest.raises(error) as caught:
        trace(source)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_factory_that_needs_a_missing_package_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TraceFailed, match="'needy' needs the module 'surely_not_installed'"):
        trace("needy:make")


def test_example_inputs_that_do_not_fit_are_said_to_be_the_reason() -> None:
    with pytest.raises(TraceFailed, match="example inputs fit forward"):
        trace_module(nn.Linear(4, 4), torch.zeros(2, 3))


def test_an_exported_file_comes_in_as_it_was_exported(tmp_path: Path) -> None:
    module, example = small()
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "small.pt2")
    graph = trace(tmp_path / "small.pt2")
    verify(graph, "trace", rerun=True)
    assert graph.source.name == "small"
    assert graph.source.architecture == "Sequential"
    given = torch.randn(5, 4)
    torch.testing.assert_close(graph.module(given), module(given))


def test_a_damaged_exported_file_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"not a program")
    with pytest.raises(FileUnreadable, match=r"bad\.pt2"):
        trace(tmp_path / "bad.pt2")


def test_what_export_refuses_comes_in_by_symbolic_trace_and_says_so() -> None:
    module = Remembering()
    given = torch.randn(3, 4)
    graph = trace_module(module, torch.randn(2, 4))
    verify(graph, "trace")
    assert "torch.fx.symbolic_trace" in graph.source.notes[0]
    assert module.last is None, "tracing left something behind in the user's module"
    torch.testing.assert_close(graph.module(given), module(given))


def test_what_both_doors_refuse_gives_both_reasons() -> None:
    with pytest.raises(
        TraceFailed, match=r"torch\.export refused it .* and torch\.fx\.symbolic_trace too"
    ) as caught:
        trace_module(Deciding(), torch.randn(2, 4))
    assert "data-dependent" in str(caught.value)


def test_a_shared_weight_goes_by_its_first_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    graph = trace_module(Tied(), torch.zeros(1, 3, dtype=torch.long))
    assert [str(node.target) for node in graph.module.graph.nodes if node.op == "get_attr"] == [
        "table.weight"
    ]


def test_operations_in_place_become_functional() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] = 7.0
            return y.relu_().add_(1.0)

    graph = trace_module(InPlace(), torch.randn(2, 3))
    verify(graph, "trace")
    given = torch.randn(4, 3)
    torch.testing.assert_close(graph.module(given), InPlace()(given))


def test_inputs_by_name_and_dynamic_shapes_of_the_users_own() -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return left + 1, left @ right

    wide = Dim("wide")
    graph = trace_module(
        Two(),
        {"left": torch.randn(2, 3), "right": torch.randn(3, 5)},
        dynamic_shapes={"left": None, "right": {1: wide}},
    )
    first, second = graph.module(torch.ones(2, 3), torch.ones(3, 9))
    assert (first.shape, second.shape) == ((2, 3), (2, 9))


def test_nodes_know_their_module_and_their_layer() -> None:
    graph = trace_module(nn.Sequential(Block(), Block()), torch.randn(2, 6, 32))
    linears = [n for n in graph.module.graph.nodes if str(n.target) == "aten.linear.default"]
    assert [layer_of(node) for node in linears] == [0] * 7 + [1] * 7
    assert module_path(linears[7]) == "1.attention.q"


def test_the_mode_of_the_users_module_is_left_alone() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))
    module[1].eval()
    graph = trace_module(module, torch.randn(2, 3))
    assert [part.training for part in module] == [True, False]
    assert "dropout" not in graph.module.code or "False" in graph.module.code
