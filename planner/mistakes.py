"""pydantic's validation errors, in planc's words: one message with the field, the value and the mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from planc.errors import InvalidField, PlancError, UnknownField

_UNIT = re.compile(r"(ttft|tpot|itl|e2e)_(mean|p[\d.]+)_([a-z]+)")
_NO_STAT = re.compile(r"(ttft|tpot|itl|e2e)(_ms)?")

#: pydantic error type -> (reason, mend); `{...}` are pydantic's own context values
_WORDS: dict[str, tuple[str, str]] = {
    "greater_than": ("must be above {gt}", "Give a number above {gt}."),
    "greater_than_equal": ("must be at least {ge}", "Give a number of at least {ge}."),
    "less_than": ("must be below {lt}", "Give a number below {lt}."),
    "less_than_equal": ("must be at most {le}", "Give a number of at most {le}."),
    "literal_error": ("not one of the choices", "Choose {expected}."),
    "int_parsing": ("not a whole number", "Give a whole number."),
    "int_type": ("not a whole number", "Give a whole number."),
    "int_from_float": ("not a whole number", "Give a whole number."),
    "float_parsing": ("not a number", "Give a plain number; the unit is in the field's name."),
    "float_type": ("not a number", "Give a plain number; the unit is in the field's name."),
    "finite_number": ("not a finite number", "Give a finite number."),
    "string_type": ("not a name", "Give text."),
    "string_too_short": ("empty", "Give a name."),
    "string_pattern_mismatch": ("not a usable name", "Use letters, digits, '.', '_' and '-'."),
    "list_type": ("not a list", "Write a list: [a, b]."),
    "dict_type": ("not a mapping", "Write {{key: value}}."),
    "model_type": ("not a mapping", "Write {{key: value}}; see examples/requests."),
    "model_attributes_type": ("not a mapping", "Write {{key: value}}; see examples/requests."),
    "too_short": ("empty", "Give at least one entry."),
}


def translated(
    error: ValidationError, model: type[BaseModel], raw: Mapping[str, Any], where: str
) -> PlancError:
    """The one error to show: unknown keys first (they explain the missing ones), then in order."""
    found = error.errors(include_url=False)
    first = min(found, key=lambda e: e["type"] != "extra_forbidden")
    loc = _as_written(tuple(first["loc"]), raw)
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(loc, model, where)
    if kind == "planc_slo":
        return _unknown_objective(context["key"], where)
    if kind == "planc_at":
        return InvalidField(
            where=where,
            field=f"{spelled(loc)}.{context['key']}",
            value=context["value"],
            reason=first["msg"],
            mend=context["mend"],
        )
    if kind == "planc":
        return InvalidField(
            where=where,
            field=spelled(loc),
            value=_short(first["input"]),
            reason=first["msg"],
            mend=context["mend"],
        )
    if kind == "missing":
        return InvalidField(
            where=where, field=spelled(loc), value=None, reason="missing", mend=f"Add '{loc[-1]}'."
        )
    reason, mend = _WORDS.get(kind, (first["msg"], "See examples/requests."))
    return InvalidField(
        where=where,
        field=spelled(loc),
        value=_short(first["input"]),
        reason=reason.format(**context),
        mend=mend.format(**context),
    )


Loc = tuple[int | str, ...]


def _as_written(loc: Loc, raw: Mapping[str, Any]) -> Loc:
    """Undoes the short forms: a lone class lies under `workload` itself, a plain length has no `mean`."""
    workload = raw.get("workload")
    if loc[:3] == ("workload", "classes", 0) and isinstance(workload, dict) and "classes" not in workload:
        loc = ("workload", *loc[3:])
    elif loc[:2] == ("workload", "classes") and isinstance(workload, list):
        loc = ("workload", *loc[2:])
    if len(loc) > 1 and loc[-1] == "mean" and not isinstance(_value_at(raw, loc[:-1]), dict):
        loc = loc[:-1]
    return loc


def _value_at(raw: Any, loc: Loc) -> Any:
    for part in loc:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def spelled(loc: Loc) -> str:
    """("inventory", "nodes", 0, "gpu") -> "inventory.nodes[0].gpu"."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _short(value: Any) -> Any:
    text = repr(value)
    return value if len(text) <= 120 else text[:117] + "..."


def _unknown_key(loc: Loc, model: type[BaseModel], where: str) -> UnknownField:
    key = str(loc[-1])
    here = _model_at(model, loc[:-1]) or _model_at(model, ("workload", "classes", *loc[1:-1]))
    fields = list(here.model_fields) if here else []
    elsewhere = {name: path for path, name in _all_fields(model) if path != spelled(loc[:-1])}
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    if ":" in key:
        mend = f"Put a space after the colon: '{key.replace(':', ': ', 1)}'."
    elif key in elsewhere:
        mend = f"It belongs under '{elsewhere[key]}'." if elsewhere[key] else "It belongs at the top level."
    elif near:
        mend = f"Did you mean '{near[0]}'?"
    else:
        mend = f"Known here: {', '.join(fields)}."
    return UnknownField(where=where, field=spelled(loc), mend=mend)


def _unknown_objective(key: str, where: str) -> UnknownField:
    unit = _UNIT.fullmatch(key)
    if unit and unit[3] == "ms":
        mend = f"A percentile lies above p0 and below p100, e.g. '{unit[1]}_p99_ms'."
    elif unit:
        mend = f"Times are in milliseconds: write '{unit[1]}_{unit[2]}_ms' and give the value in ms."
    elif _NO_STAT.fullmatch(key):
        metric = key.split("_")[0]
        mend = f"Say which statistic: '{metric}_mean_ms' or '{metric}_p99_ms'."
    else:
        known = [
            f"{m}_{s}_ms"
            for m in ("ttft", "tpot", "itl", "e2e")
            for s in ("mean", "p50", "p90", "p95", "p99")
        ]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        mend = (
            f"Did you mean '{near[0]}'?"
            if near
            else "Objectives are ttft, tpot, itl or e2e, then _mean_ms or _p99_ms (any percentile)."
        )
    return UnknownField(where=where, field=f"slo.{key}", mend=mend)


def _model_at(model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    here: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):
            continue
        if here is None or part not in here.model_fields:
            return None
        here = _inner(here.model_fields[part].annotation)
    return here


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _inner(argument)
        if found:
            return found
    return None


def _all_fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield path, name
        inner = _inner(field.annotation)
        if inner and not path.startswith(f"{name}."):
            yield from _all_fields(inner, f"{path}.{name}" if path else name)
