"""`--set path=value`: changes to a request before it is validated."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from planc.errors import InvalidField
from planc.planner.yaml_text import parsed_yaml

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with each "a.b[0].c=value" put in place. A string value is read as YAML.

    Raises InvalidField for a path that leads through something that is not there.
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_split, overrides)
    out: dict[str, Any] = copy.deepcopy(dict(raw))
    for path, value in pairs:
        _put(out, path, _value(path, value))
    return out


def _split(item: str) -> tuple[str, str]:
    path, equals, value = item.partition("=")
    if not equals or not path.strip():
        raise InvalidField(
            where="command line",
            field="--set",
            value=item,
            reason="not of the form PATH=VALUE",
            mend="Write for example --set slo.tpot_mean_ms=25.",
        )
    return path.strip(), value


def _value(path: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parsed_yaml(value)
    except yaml.YAMLError:
        raise InvalidField(
            where="command line", field=path, value=value, reason="not a YAML value", mend="Quote it."
        ) from None


def _put(root: dict[str, Any], path: str, value: Any) -> None:
    steps: list[str | int] = [int(i) if i else name for name, i in _STEP.findall(path)]
    here: Any = root
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(step, str) and step.isdigit() and isinstance(here, list):
            step = int(step)
        last = following is None
        if isinstance(step, int):
            if not isinstance(here, list) or not 0 <= step < len(here):
                raise _lost(path, value, f"there is no entry [{step}]")
        elif not isinstance(here, dict):
            raise _lost(path, value, f"'{step}' lies inside something that is not a mapping")
        elif not last and here.get(step) is None:
            here[step] = {}
        if last:
            here[step] = value
        else:
            here = here[step]


def _lost(path: str, value: Any, reason: str) -> InvalidField:
    return InvalidField(
        where="command line",
        field=path,
        value=value,
        reason=reason,
        mend="Paths look like slo.tpot_mean_ms or inventory.nodes[0].count.",
    )
