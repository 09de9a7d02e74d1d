"""What a check of a kernel found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked. `what` is e.g. "numbers bf16 n=200" or "sm_90 n=8192"."""

    kernel: str
    what: str
    ok: bool
    detail: str
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0


def words(size: Mapping[str, Any]) -> str:
    """A size in words, e.g. "head_dim=128 rotary=64"."""
    return " ".join(f"{name}={value}" for name, value in size.items())
