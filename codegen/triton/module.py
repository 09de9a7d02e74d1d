"""Loading a kernel's text as a Python module."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from planc.codegen.triton.kernel import Kernel


@contextmanager
def loaded(kernel: Kernel) -> Iterator[ModuleType]:
    """The kernel's file as a module (Triton reads a kernel's text from its file, so there must be one)."""
    with tempfile.TemporaryDirectory(prefix="planc-kernel-") as folder:
        file = Path(folder) / kernel.file
        file.write_text(kernel.source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"planc_kernel_{kernel.name}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
