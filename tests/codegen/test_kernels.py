"""Generated kernels: their text, their numbers in the interpreter, what they take on a GPU."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from planc.codegen.triton import check, render
from planc.codegen.triton.finding import Finding
from planc.codegen.triton.kernel import from_manifest
from planc.codegen.triton.kinds import KINDS
from planc.codegen.triton.sizes import Sizes
from planc.errors import InvalidBundle, UnknownName
from tests.codegen.plans import plan, replica

ROOT = Path(__file__).parents[2]
LLAMA = json.loads((ROOT / "examples/models/llama-3.1-70b.json").read_text())


@pytest.mark.parametrize("name", sorted(KINDS))
def test_text(name: str, golden: Callable[[str, str], None]) -> None:
    kernel = render.render(KINDS[name])
    golden(f"kernels/{name}.py", kernel.source)
    defined = {node.name for node in ast.parse(kernel.source).body if isinstance(node, ast.FunctionDef)}
    assert {"kernel", "configure", "grid", "launch"} <= defined
    (entry,) = (n for n in ast.parse(kernel.source).body if getattr(n, "name", "") == "kernel")
    assert isinstance(entry, ast.FunctionDef)
    assert [a.arg for a in entry.args.args] == list(kernel.signature), (
        "the manifest's signature is not the kernel's"
    )


def test_text_is_formatted(tmp_path: Path) -> None:
    """Golden kernels are read by people: as ruff would leave them."""
    for kind in KINDS.values():
        (tmp_path / f"{kind.name}.py").write_text(render.render(kind).source)
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    assert ruff is not None
    done = subprocess.run(
        [ruff, "format", "--check", "--line-length", "110", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_plan_names_its_kernels() -> None:
    found = {kernel.name: kernel for kernel in render.kernels(plan(replica(tp=4)), LLAMA)}
    assert sorted(found) == ["add_rms_norm", "rms_norm", "rope_kv", "silu_mul"]
    assert found["add_rms_norm"].sizes == ({"n": 8192},)
    assert found["silu_mul"].sizes == ({"n": 28672 // 4},)
    assert found["rope_kv"].sizes == ({"head_dim": 128, "rotary": 128},)
    assert found["silu_mul"].layer_classes == ("decoder",)


def test_fp8_activations_bring_quantising_stores() -> None:
    found = {k.name: k for k in render.kernels(plan(replica(weights="fp8", activations="fp8")), LLAMA)}
    assert {"add_rms_norm_fp8", "rms_norm_fp8", "silu_mul_fp8"} <= set(found)
    assert found["silu_mul_fp8"].min_capability == 89
    assert "rope_kv_fp8" not in found


def test_no_fusions_no_kernels() -> None:
    bare = plan()
    layer = bare.layers[0]
    decisions = layer.decisions.model_copy(update={"fusions": ["qkv_merge"]})
    bare = bare.model_copy(update={"layers": [layer.model_copy(update={"decisions": decisions})]})
    assert render.kernels(bare, LLAMA) == []


@pytest.mark.parametrize(
    ("model", "gated", "heads"),
    [
        ("qwen3-30b-a3b", (768, 6144), ((128, 128),)),
        ("minimax-m2.5", (1536,), ((128, 64),)),
        ("gemma-4-26b-a4b", (704, 2112), ((256, 256), (512, 512))),
    ],
)
def test_sizes_of_models(model: str, gated: tuple[int, ...], heads: tuple[tuple[int, int], ...]) -> None:
    config = json.loads((ROOT / f"examples/models/{model}.json").read_text())
    sizes = Sizes.of(config, [1])
    assert sizes.gated == gated
    assert sizes.heads == heads


def test_same_text_for_every_plan() -> None:
    """What a check found is kept by content, so a kernel's text must not depend on the plan."""
    one = {k.name: k.source for k in render.kernels(plan(name="a"), LLAMA)}
    other = {k.name: k.source for k in render.kernels(plan(replica(tp=8), name="b"))}
    assert one == other


@pytest.fixture(scope="module")
def numbers() -> list[Finding]:
    from planc.codegen.triton.numbers import in_interpreter

    return in_interpreter([render.render(kind) for kind in KINDS.values()], seed=11)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_numbers_in_the_interpreter(name: str, numbers: list[Finding]) -> None:
    own = [finding for finding in numbers if finding.kernel == name]
    assert len(own) >= 3, "one per dtype at least"
    assert [f"{f.what}: {f.detail}" for f in own if not f.ok] == []


WRONG = {
    "rms_norm": ("weight + weight_offset", "weight"),
    "add_rms_norm": ("x = x + tl.load(residual_ptr", "x = x - tl.load(residual_ptr"),
    "silu_mul_fp8": ("/ 448.0", "/ 500.0"),
    "rope_kv": ("b * cos + a * sin", "b * cos - a * sin"),
    "qk_norm_rope_kv": ("v / v_scale", "v * v_scale"),
}


def test_wrong_kernels_are_found() -> None:
    from planc.codegen.triton.numbers import in_interpreter

    broken = []
    for name, (right, wrong) in WRONG.items():
        kernel = render.render(KINDS[name])
        assert right in kernel.source
        broken.append(replace(kernel, source=kernel.source.replace(right, wrong)))
    found = in_interpreter(broken)
    assert {finding.kernel for finding in found if not finding.ok} == set(WRONG)


def test_compiles_for_h100_without_spilling(tmp_path: Path) -> None:
    kernel = render.render(KINDS["add_rms_norm_fp8"], sizes=({"n": 8192},))
    found = check.check([kernel], targets=("sm_90", "sm_80"), cache=tmp_path)
    on_h100 = [f for f in found if f.what == "sm_90 n=8192"]
    assert [f.ok for f in on_h100] == [True]
    assert 0 < on_h100[0].registers <= 255
    assert on_h100[0].shared_bytes > 0
    assert any("needs sm_89" in f.detail for f in found if f.what == "sm_80")
    (kept,) = tmp_path.glob("kernel-*.json")
    kept.write_text(kept.read_text().replace('"ok": true', '"ok": false'))
    assert not any(f.ok for f in check.check([kernel], targets=("sm_90", "sm_80"), cache=tmp_path)), (
        "read anew"
    )


def test_spilling_is_refused() -> None:
    """A row of 8192 in one warp cannot be held: the compiler says nothing, the check does."""
    kernel = render.render(KINDS["rms_norm"], sizes=({"n": 8192},))
    narrow = replace(kernel, source=kernel.source.replace("min(32, max(4, tile // 1024))", "1"))
    from planc.codegen.triton.resources import resources

    (finding,) = resources([narrow], ["sm_90"])
    assert not finding.ok
    assert "spilled" in finding.detail


def test_unknown_target() -> None:
    from planc.codegen.triton.resources import resources

    with pytest.raises(UnknownName, match="sm_90"):
        resources([render.render(KINDS["rms_norm"])], ["sm_91x"])


def test_bundle_kernels_are_the_ones_listed(tmp_path: Path) -> None:
    from planc.codegen import bundle

    bundle.write(plan(), tmp_path / "b", config=LLAMA)
    found = check.bundle_kernels(tmp_path / "b")
    assert [k.name for k in found] == ["add_rms_norm", "rms_norm", "rope_kv", "silu_mul"]
    entry = found[0].described()
    assert from_manifest(entry, found[0].source) == found[0]
    file = tmp_path / "b/kernels/silu_mul.py"
    file.write_text(file.read_text() + "# touched\n")
    with pytest.raises(InvalidBundle, match=r"silu_mul\.py"):
        check.bundle_kernels(tmp_path / "b")
