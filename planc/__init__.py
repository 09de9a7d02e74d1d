"""planc compiles a model to a serving plan.

The roof: the public Python API, the command line and the error catalogue. Only this
room imports all the others, and it does so lazily: `import planc` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from planc.version import __version__

if TYPE_CHECKING:
    from planc.api import (
        compile as compile,
    )
    from planc.api import (
        diff as diff,
    )
    from planc.api import (
        estimate as estimate,
    )
    from planc.api import (
        explain as explain,
    )
    from planc.api import (
        load_plan as load_plan,
    )
    from planc.api import (
        load_profile as load_profile,
    )
    from planc.api import (
        load_request as load_request,
    )
    from planc.api import (
        replay as replay,
    )
    from planc.api import (
        sensitivities as sensitivities,
    )
    from planc.api import (
        validate as validate,
    )
    from planc.planner.diff import PlanDiff as PlanDiff
    from planc.planner.estimate import Estimate as Estimate
    from planc.planner.plan import Plan as Plan
    from planc.planner.request import Request as Request
    from planc.runtime.simulator.replay import Replay as Replay
    from planc.runtime.validation.report import ValidationReport as ValidationReport

_WHERE = {
    "compile": "planc.api",
    "diff": "planc.api",
    "estimate": "planc.api",
    "explain": "planc.api",
    "load_plan": "planc.api",
    "load_profile": "planc.api",
    "load_request": "planc.api",
    "replay": "planc.api",
    "sensitivities": "planc.api",
    "validate": "planc.api",
    "Estimate": "planc.planner.estimate",
    "Plan": "planc.planner.plan",
    "PlanDiff": "planc.planner.diff",
    "Replay": "planc.runtime.simulator.replay",
    "Request": "planc.planner.request",
    "ValidationReport": "planc.runtime.validation.report",
}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'planc' has no attribute {name!r}")
