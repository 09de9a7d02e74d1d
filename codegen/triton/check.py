"""Checks generated kernels on any machine: the interpreter for numbers, the compiler for resources.

A kernel passes for a target when

- its outputs under the Triton interpreter equal the float64 reference within one unit in the last place,
  for each activation dtype, on fresh inputs of awkward sizes (not powers of two, a padding token);
- it compiles ahead of time at every size the plan runs it at, with no register spilled, within the
  registers and shared memory that a block of the target may take (`limits.yaml`).

Results are kept by content (source, sizes, target, Triton version, the checks' own text), so that a
second check of the same kernel costs a file read and loads neither torch nor triton.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from planc.codegen.triton.finding import Finding
from planc.codegen.triton.kernel import Kernel, from_manifest
from planc.errors import FileMissing, InvalidBundle

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
_OWN_TEXT = ("check.py", "cases.py", "numbers.py", "resources.py", "limits.yaml")


def check(
    kernels: Iterable[Kernel], *, targets: Iterable[str] = ("sm_90",), cache: Path | None = None
) -> list[Finding]:
    """All findings of all kernels, in their order. `cache`: folder of earlier results (None: always check).

    Raises ToolFailed when the interpreter or the compiler itself cannot run.
    """
    kernels, wanted = list(kernels), tuple(targets)
    kept = {kernel.name: _kept(kernel, wanted, cache) for kernel in kernels}
    missing = [kernel for kernel in kernels if kept[kernel.name] is None]
    if missing:
        fresh = _check(missing, wanted)
        for kernel in missing:
            own = [finding for finding in fresh if finding.kernel == kernel.name]
            kept[kernel.name] = own
            if cache is not None:
                _keep(cache / _file(kernel, wanted), own)
    return [finding for kernel in kernels for finding in kept[kernel.name] or ()]


def bundle_kernels(folder: str | Path) -> list[Kernel]:
    """The kernels of a bundle, as they lie on disk.

    Raises FileMissing, or InvalidBundle where a file's text is not what the manifest says.
    """
    place = Path(folder) / "kernels"
    file = place / "manifest.json"
    if not file.is_file():
        raise FileMissing(what="kernels", path=file, mend="Name a folder that `planc compile -o` wrote.")
    found = []
    for entry in json.loads(file.read_text(encoding="utf-8"))["kernels"]:
        source = place / entry["file"]
        kernel = from_manifest(entry, source.read_text(encoding="utf-8") if source.is_file() else "")
        if kernel.sha256 != entry["sha256"]:
            raise InvalidBundle(
                path=folder,
                reason=f"kernels/{entry['file']} is not the text that its manifest lists",
                mend="Compile again, or restore the file; changes belong in planc's templates.",
            )
        found.append(kernel)
    return found


def _check(kernels: Sequence[Kernel], targets: tuple[str, ...]) -> list[Finding]:
    from planc.codegen.triton.numbers import in_interpreter
    from planc.codegen.triton.resources import resources

    return [*in_interpreter(kernels), *resources(kernels, targets)]


def _kept(kernel: Kernel, targets: tuple[str, ...], cache: Path | None) -> list[Finding] | None:
    file = None if cache is None else cache / _file(kernel, targets)
    if file is None or not file.is_file():
        return None
    return [Finding(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


def _keep(file: Path, findings: list[Finding]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([asdict(one) for one in findings]), encoding="utf-8")
    part.replace(file)


def _file(kernel: Kernel, targets: tuple[str, ...]) -> str:
    """Named by everything that a result depends on."""
    own = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in _OWN_TEXT)
    versions = importlib.metadata.version("triton") + importlib.metadata.version("torch")
    parts = [json.dumps(kernel.described(), sort_keys=True), ",".join(targets), versions, own]
    return f"kernel-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.json"
