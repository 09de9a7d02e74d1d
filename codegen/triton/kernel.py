"""What a rendered kernel is: its text and the facts that a build or a check needs to know of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Kernel:
    """One generated file.

    name            file stem, e.g. "add_rms_norm_fp8"
    op              the op of the dialect whose numbers it gives, e.g. "planc::add_rms_norm"
    source          text of the file; it defines `kernel`, `configure`, `grid` and `launch`
    signature       parameter of `kernel` -> Triton type; "*T" stands for a pointer to any of `dtypes`,
                    "constexpr" for what `configure` gives
    dtypes          activation types it takes, as Triton names
    grid            what `grid` computes, in words
    sizes           arguments of `configure` that this plan needs, one mapping per distinct shape
    min_capability  lowest CUDA compute capability (major * 10 + minor) with the instructions it uses
    layer_classes   layer classes of the plan that use it
    """

    name: str
    op: str
    source: str
    signature: Mapping[str, str]
    dtypes: tuple[str, ...]
    grid: str
    sizes: tuple[Mapping[str, int], ...] = ()
    min_capability: int = 80
    layer_classes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return f"{self.name}.py"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def described(self) -> dict[str, Any]:
        """The kernel's entry in `manifest.json`."""
        return {
            "name": self.name,
            "op": self.op,
            "file": self.file,
            "sha256": self.sha256,
            "signature": dict(self.signature),
            "constexprs": [name for name, kind in self.signature.items() if kind == "constexpr"],
            "dtypes": list(self.dtypes),
            "grid": self.grid,
            "sizes": [dict(size) for size in self.sizes],
            "min_capability": self.min_capability,
            "layer_classes": list(self.layer_classes),
            "options": dict(self.options),
        }


def from_manifest(entry: Mapping[str, Any], source: str) -> Kernel:
    """The kernel of a manifest entry and its file's text."""
    return Kernel(
        name=entry["name"],
        op=entry["op"],
        source=source,
        signature=entry["signature"],
        dtypes=tuple(entry["dtypes"]),
        grid=entry["grid"],
        sizes=tuple(entry["sizes"]),
        min_capability=entry["min_capability"],
        layer_classes=tuple(entry["layer_classes"]),
        options=entry["options"],
    )
