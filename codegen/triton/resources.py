"""Compiles kernels ahead of time for GPU targets and reads what they take. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import triton  # type: ignore[import-untyped]
import yaml
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from planc.codegen.triton import cases
from planc.codegen.triton.finding import Finding, words
from planc.codegen.triton.kernel import Kernel
from planc.codegen.triton.kinds import KINDS
from planc.codegen.triton.module import loaded
from planc.errors import ToolFailed, UnknownName


def resources(kernels: Sequence[Kernel], targets: Sequence[str]) -> list[Finding]:
    """Findings of all kernels at each size, per target ("sm_90"). Raises UnknownName for a target."""
    limits = yaml.safe_load((Path(__file__).parent / "limits.yaml").read_text(encoding="utf-8"))
    for target in targets:
        if target not in limits:
            known = ", ".join(limits)
            raise UnknownName(field="target", value=target, kind="GPU target", mend=f"Known: {known}.")
    found: list[Finding] = []
    for kernel in kernels:
        with loaded(kernel) as module:
            for target in targets:
                found += _resources(kernel, module, target, limits[target])
    return found


def _resources(
    kernel: Kernel, module: ModuleType, target: str, limit: Mapping[str, int]
) -> Iterator[Finding]:
    capability = int(target.removeprefix("sm_"))
    if capability < kernel.min_capability:
        detail = f"needs sm_{kernel.min_capability}: not compiled for {target}"
        yield Finding(kernel.name, target, True, detail)
        return
    for size in kernel.sizes or cases.COMMON_SIZES[KINDS[kernel.name].template]:
        what = f"{target} {words(size)}"
        try:
            used = compile_for(kernel, module, size, capability)
        except triton.CompilationError as error:
            yield Finding(kernel.name, what, False, f"does not compile: {error}")
            continue
        registers, stack, shared = used
        wrong = [
            *([f"{stack} bytes of registers spilled"] if stack else []),
            *([f"{registers} registers of {limit['registers']}"] if registers > limit["registers"] else []),
            *(
                [f"{shared} bytes shared of {limit['shared_bytes']}"]
                if shared > limit["shared_bytes"]
                else []
            ),
        ]
        detail = "; ".join(wrong) or f"{registers} registers, {shared} bytes shared, no spill"
        yield Finding(kernel.name, what, not wrong, detail, registers, shared, stack)


def compile_for(
    kernel: Kernel, module: ModuleType, size: Mapping[str, int], capability: int, dtype: str = "bf16"
) -> tuple[int, int, int]:
    """Compiles ahead of time. Returns registers per thread, stack bytes (spills), shared bytes per block.

    Pointers, widths and strides are declared divisible by 16, as the just-in-time compiler would find.
    Raises triton.CompilationError.
    """
    settings = dict(module.configure(**size))
    warps = settings.pop("num_warps")
    names = module.kernel.arg_names
    types = {
        name: "constexpr" if name in settings else _concrete(kernel.signature[name], dtype) for name in names
    }
    aligned = [["tt.divisibility", 16]]
    hints = {
        (index,): aligned
        for index, name in enumerate(names)
        if types[name].startswith("*") or name == "n" or name.endswith("_stride")
    }
    source = ASTSource(
        fn=module.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in settings.items()},
        attrs=hints,
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    registers, stack = _usage(built.asm["cubin"])
    return registers, stack, int(built.metadata.shared)


def _concrete(kind: str, dtype: str) -> str:
    return {"*T": f"*{dtype}", "*C": f"*{dtype}"}.get(kind, kind)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and stack bytes of a compiled kernel, as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        raise ToolFailed(
            tool="cuobjdump", reason=f"not in Triton {triton.__version__}", mend="Reinstall triton."
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if match is None:
        raise ToolFailed(
            tool="cuobjdump", reason=done.stderr.strip() or "no usage in its output", mend="Reinstall triton."
        )
    return int(match[1]), int(match[2])
