"""The commands end to end on a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planc.cli import COMMANDS
from tests.roof.support import ROOT, Planc, write_request


def test_compile_writes_a_whole_bundle(planc: Planc, tmp_path: Path) -> None:
    result = planc("compile", write_request(tmp_path), "-o", tmp_path / "b", "--json")
    assert result.code == 0, result.err
    plan = json.loads((tmp_path / "b/plan.json").read_text(encoding="utf-8"))
    assert result.json()["plan"]["fingerprint"] == plan["fingerprint"]
    for part in ("README.md", "report.html", "kernels/manifest.json", "engines/vllm", "model/config.json"):
        assert (tmp_path / "b" / part).exists(), part
    assert not [p for p in tmp_path.iterdir() if p.name not in ("b", "request.yaml")]


def test_two_compilations_give_the_same_bytes(tmp_path: Path) -> None:
    request = write_request(tmp_path)
    texts = []
    for seed in ("1", "2"):
        target = tmp_path / seed
        command = [sys.executable, "-m", "planc.cli", "compile", str(request), "-o", str(target)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        texts.append((target / "plan.json").read_bytes())
    assert texts[0] == texts[1]


def test_planning_from_a_cached_trace_imports_no_torch(tmp_path: Path, bundle: Path) -> None:
    request = write_request(tmp_path)  # the model of `bundle`, whose compilation filled the cache
    code = (
        "import sys; from planc import api; "
        f"plan = api.compile({str(request)!r}); api.write_bundle(plan, {str(tmp_path / 'b')!r}); "
        "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_settings_of_an_estimate_are_those_it_evaluates(planc: Planc, tmp_path: Path) -> None:
    request = write_request(tmp_path)
    one = planc("estimate", request, "--set", "tp=1", "--json").json()
    two = planc("estimate", request, "--set", "tp=2", "--set", "max_num_seqs=8", "--json").json()
    assert (one["replica"]["tp"], two["replica"]["tp"]) == (1, 2)
    assert two["replica"]["max_num_seqs"] == 8


def test_a_plan_differs_from_another_but_not_from_itself(planc: Planc, tmp_path: Path, bundle: Path) -> None:
    assert planc("diff", bundle, bundle).code == 0
    assert planc("diff", bundle, bundle, "--json").json()["changes"] == []
    faster = tmp_path / "faster"
    done = planc("compile", write_request(tmp_path), "-o", faster, "--set", "objective=min_latency")
    assert done.code == 0, done.err
    differs = planc("diff", bundle, faster)
    assert differs.code == 1
    assert differs.out.strip()


@pytest.mark.parametrize("options", [(), ("--memory",), ("--ops",), ("--json",)])
def test_a_bundle_is_inspected(options: tuple[str, ...], planc: Planc, bundle: Path) -> None:
    result = planc("inspect", bundle, *options)
    assert result.code == 0, result.err
    assert result.out.strip()


def test_a_graph_is_printed_and_what_a_pass_changed(planc: Planc, bundle: Path) -> None:
    decode = planc("inspect", bundle, "--graph", "decode")
    assert decode.code == 0, decode.err
    assert "planc.paged_attention" in decode.out or "planc.rope_paged" in decode.out
    change = planc("inspect", bundle, "--graph", "decode", "--pass", "fusion")
    assert change.code == 0, change.err
    assert any(line.startswith("+") for line in change.out.splitlines())
    unknown = planc("inspect", bundle, "--pass", "magic")
    assert unknown.code == 2
    assert "fusion" in unknown.err


def test_a_model_is_inspected_without_a_plan(planc: Planc) -> None:
    result = planc("inspect", ROOT / "examples/models/qwen3-0.6b.json", "--ops")
    assert result.code == 0, result.err
    assert "0.596 B" in result.out


@pytest.mark.parametrize("command", ["hardware", "engines", "models"])
def test_the_catalogue_is_listed(command: str, planc: Planc) -> None:
    assert planc(command).code == 0
    listed = planc(command, "--json").json()
    assert listed


def test_one_catalogue_entry_names_its_source(planc: Planc) -> None:
    entry = planc("hardware", "h200_sxm", "--json").json()
    assert entry["source"]
    assert entry["date"]
    missing = planc("hardware", "h200_sxn")
    assert missing.code == 2
    assert "h200_sxm" in missing.err


def test_every_command_has_help(planc: Planc) -> None:
    for command in COMMANDS:
        result = planc(command, "--help")
        assert result.code == 0, command
        assert "Usage" in result.out
