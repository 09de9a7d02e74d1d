"""One module per engine: how a plan's settings are written in that engine's own configuration.

An engine module has `render(plan, config) -> {file: text}` (files below `engines/<name>/`) and
`readme(plan) -> str` (its part of the bundle's README). `WRITERS` names the modules; they load on use.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from planc.errors import UnknownName
from planc.planner.plan import Plan

#: engine name in a plan -> module that writes its files
WRITERS: Mapping[str, str] = {"vllm": "planc.codegen.engines.vllm"}


class Writer(Protocol):
    """What an engine module offers."""

    def render(self, plan: Plan, config: Mapping[str, Any] | None = None) -> dict[str, str]: ...

    def readme(self, plan: Plan) -> str: ...


def writer(engine: str) -> Writer:
    """The module that writes an engine's files. Raises UnknownName."""
    if engine not in WRITERS:
        raise UnknownName(
            field="engine",
            value=engine,
            kind="engine that planc writes files for",
            mend=f"Known: {', '.join(sorted(WRITERS))}.",
        )
    return cast(Writer, import_module(WRITERS[engine]))


def engines_of(plan: Plan) -> list[str]:
    """Names of the engines a plan runs, without repetition."""
    return sorted({replica.engine for replica in plan.replicas()})
