"""Bundles: whole or not at all, never over something else, safe to open."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planc import files
from planc.codegen import bundle
from planc.errors import CheckFailed, InvalidBundle
from planc.planner.plan import load_plan
from tests.codegen.plans import plan, replica

ROOT = Path(__file__).parents[2]
LLAMA = json.loads((ROOT / "examples/models/llama-3.1-70b.json").read_text())


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_holds_everything(tmp_path: Path) -> None:
    made = plan(replica(tp=4))
    bundle.write(made, tmp_path / "new" / "b", config=LLAMA)
    folder = tmp_path / "new" / "b"
    assert set(contents(folder)) == {
        "plan.json",
        "README.md",
        "report.html",
        "model/config.json",
        "kernels/manifest.json",
        *(f"kernels/{name}.py" for name in ("add_rms_norm", "rms_norm", "rope_kv", "silu_mul")),
        "engines/vllm/h200_sxm-tp4-bf16/config.yaml",
        "engines/vllm/h200_sxm-tp4-bf16/launch.sh",
    }
    assert load_plan(folder) == made
    assert json.loads((folder / "model/config.json").read_text()) == LLAMA
    assert os.access(folder / "engines/vllm/h200_sxm-tp4-bf16/launch.sh", os.X_OK)
    assert [f.name for f in folder.parent.iterdir()] == ["b"], "nothing is left beside it"


def test_same_plan_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        bundle.write(plan(replica(tp=4)), tmp_path / name, config=LLAMA)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_replaces_a_bundle_and_only_a_bundle(tmp_path: Path) -> None:
    target = tmp_path / "b"
    bundle.write(plan(name="old"), target)
    (target / "notes.txt").write_text("mine")
    bundle.write(plan(name="new"), target)
    assert load_plan(target).model.name == "new"
    assert not (target / "notes.txt").exists()

    other = tmp_path / "home"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidBundle, match="not a bundle"):
        bundle.write(plan(), other)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidBundle, match="not a bundle"):
        bundle.write(plan(), tmp_path / "file")
    (other / "plan.json").write_text('{"my": "plan"}')
    with pytest.raises(InvalidBundle):
        bundle.write(plan(), other)
    assert contents(other)["thesis.tex"] == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    bundle.write(plan(), empty)


def test_a_refusal_leaves_the_old_bundle(tmp_path: Path) -> None:
    bundle.write(plan(name="old"), tmp_path / "b")
    before = contents(tmp_path / "b")
    with pytest.raises(CheckFailed):
        bundle.write(plan(replica(tp=4, ep=2)), tmp_path / "b")
    assert contents(tmp_path / "b") == before
    assert [f.name for f in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidBundle, match="cannot be written"):
        bundle.write(plan(), tmp_path / "file" / "b")


def test_through_a_link(tmp_path: Path) -> None:
    bundle.write(plan(name="old"), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    bundle.write(plan(name="new"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_plan(tmp_path / "real").model.name == "new"


def test_without_an_exchange_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    bundle.write(plan(name="old"), tmp_path / "b")
    bundle.write(plan(name="new"), tmp_path / "b")
    assert load_plan(tmp_path / "b").model.name == "new"
    assert [f.name for f in tmp_path.iterdir()] == ["b"]


KILLED = """
import sys, time, pathlib
sys.path.insert(0, {root!r})
from planc.codegen import bundle
from tests.codegen.plans import plan
write_text = pathlib.Path.write_text
def slow(self, *args, **kwargs):
    done = write_text(self, *args, **kwargs)
    if self.name == "report.html":
        print("half", flush=True)
        time.sleep(60)
    return done
pathlib.Path.write_text = slow
bundle.write(plan(name="new"), {target!r})
"""


def test_killed_half_way(tmp_path: Path) -> None:
    """The old bundle stands, and the next run clears what the killed one left."""
    target = tmp_path / "b"
    bundle.write(plan(name="old"), target)
    code = KILLED.format(root=str(ROOT), target=str(target))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "half"
        process.send_signal(signal.SIGKILL)
    assert load_plan(target).model.name == "old"
    left = [f for f in tmp_path.iterdir() if f.name != "b"]
    assert [f.name.startswith(".b.") for f in left] == [True]
    bundle.write(plan(name="next"), target)
    assert load_plan(target).model.name == "next"
    assert [f.name for f in tmp_path.iterdir()] == ["b"]


def test_renders_without_torch_and_fast() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from planc.codegen import bundle\nfrom tests.codegen.plans import plan\n"
        "assert 'plan.json' in bundle.files(plan())\n"
        "print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - began < 30
