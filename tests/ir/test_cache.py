"""The trace cache: what comes back is what went in, and no damage to it is ever fatal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from planc.errors import FileMissing, FileUnreadable
from planc.ir.graph import Graph
from planc.ir.text import show
from planc.ir.trace import cache, trace
from planc.ir.trace.fingerprint import fingerprint, installed
from planc.ir.trace.store import dumps, loads
from planc.ir.verify import verify
from planc.passes.pipeline import FRONT, run
from planc.passes.tabulate import load_table
from tests.families import FAMILIES, tiny_graph

TINY = {**FAMILIES["llama"], "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys as if planc's own files never changed, so that editing one does not fail a test."""
    monkeypatch.setattr(cache, "source_digest", lambda: "settled")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_5"])
def test_a_stored_graph_comes_back_the_same(family: str) -> None:
    graph = tiny_graph(family)
    again = loads(dumps(graph))
    verify(again, "load", rerun=True)
    assert show(again) == show(graph)
    assert again.source == graph.source
    assert show(run(again, FRONT)) == show(run(graph, FRONT))


def test_buffers_come_back_with_their_values_and_weights_on_meta() -> None:
    graph = tiny_graph("llama")
    again = loads(dumps(graph))
    ours, theirs = (dict(g.module.named_buffers()) for g in (graph, again))
    assert ours.keys() == theirs.keys()
    held = [name for name, buffer in ours.items() if not buffer.is_meta]
    assert held
    for name in held:
        assert torch.equal(ours[name], theirs[name])
    assert all(parameter.is_meta for parameter in again.module.parameters())


def test_a_graph_that_a_pass_touched_is_not_stored() -> None:
    with pytest.raises(ValueError, match="no pass has touched"):
        dumps(run(tiny_graph("llama"), FRONT))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was traced, not found in the cache. The trace itself is one of the tiny families'."""
    names: list[str] = []

    def once(_config: object, name: str, **_options: object) -> Graph:
        names.append(name)
        return tiny_graph("llama")

    monkeypatch.setattr("planc.ir.trace.hf.trace_config", once)
    return names


def test_the_second_trace_comes_from_the_cache(config: Path, tmp_path: Path, traced: list[str]) -> None:
    first, second = (trace(config, cache=tmp_path / "cache") for _ in range(2))
    assert traced == ["tiny"]
    assert show(first) == show(second)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"], "a temporary file is left"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "binary", "other"])
def test_a_damaged_entry_is_made_anew(config: Path, tmp_path: Path, traced: list[str], damage: str) -> None:
    folder = tmp_path / "cache"
    first = show(trace(config, cache=folder))
    (entry,) = folder.glob("*.graph.json")
    whole = entry.read_text()
    texts = {"truncated": whole[: len(whole) // 2], "flipped": whole.replace("linear", "lineer"), "empty": ""}
    if damage == "binary":
        entry.write_bytes(bytes(range(256)))
    elif damage == "other":  # whole, but not a graph
        cache.write(folder, entry.name, '{"nodes": 3}')
    else:
        entry.write_text(texts[damage])
    assert show(trace(config, cache=folder)) == first
    assert entry.read_text() == whole
    assert traced == ["tiny", "tiny"]


def test_a_cache_that_cannot_be_written_is_done_without(
    config: Path, tmp_path: Path, traced: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert trace(config, cache=tmp_path / "file").source.architecture == "LlamaForCausalLM"
    assert traced == ["tiny"]


def test_the_fingerprint_is_of_the_configuration_not_of_its_spelling(tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    names[0].write_text(json.dumps(TINY))
    names[1].write_text(json.dumps(dict(reversed(list(TINY.items()))), indent=4))
    names[2].write_text(json.dumps({**TINY, "num_hidden_layers": 3}))
    same, spelled, deeper = (fingerprint(name) for name in names)
    assert same == spelled != deeper
    assert same != fingerprint(names[0], {**installed(), "torch": "2.0"})


def test_missing_and_broken_configurations_have_clear_messages(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        fingerprint(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FileUnreadable, match="JSON"):
        fingerprint(tmp_path / "bad.json")


def test_a_cached_table_loads_without_torch_and_fast(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    table = load_table(config, cache=folder)
    program = (
        "import sys, time, pathlib\n"
        "from planc.ir.trace import cache\n"
        "from planc.passes.tabulate import load_table\n"
        "cache.source_digest = lambda: 'settled'\n"
        "start = time.perf_counter()\n"
        f"table = load_table({str(config)!r}, cache=pathlib.Path({str(folder)!r}))\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'sympy', 'triton', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy), seconds, table.fingerprint, len(table.to_json()))\n"
    )
    run_ = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy, seconds, stated, length = run_.stdout.rsplit(maxsplit=3)
    assert heavy == "[]"
    assert float(seconds) < 0.5  # 15 ms on a quiet machine
    assert (stated, int(length)) == (table.fingerprint, len(table.to_json()))


def test_a_table_is_named_after_its_own_file(config: Path, tmp_path: Path) -> None:
    """One configuration in two places is one entry, and each has the name of its place."""
    copy = tmp_path / "model" / "config.json"
    copy.parent.mkdir()
    copy.write_bytes(config.read_bytes())
    first = load_table(copy, cache=tmp_path / "cache")
    second = load_table(config, cache=tmp_path / "cache")
    assert (first.model.name, second.model.name) == ("model", config.stem)
    assert first.fingerprint == second.fingerprint
