"""Settings of one engine as users name them, on the command line or in Python, read and typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from planc.cost_model.formats import fmt
from planc.cost_model.parts import parse, scheme
from planc.errors import InvalidField, UnknownField
from planc.planner.mistakes import translated
from planc.planner.request import Speculative
from planc.planner.workload import LoadTest
from planc.planner.yaml_text import parsed_yaml

_COUNTS = (
    "tp",
    "pp",
    "dp",
    "ep",
    "cp",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "replicas",
)
_NAMES = ("weights", "activations", "kv", "engine", "gpu")
#: what can be set, by the names of a plan's replica
SETTINGS = (*_COUNTS, *_NAMES, "gpu_memory_utilization", "formats", "pipeline_layers", "speculative")


def parsed(
    settings: Mapping[str, Any], where: str = "estimate", also: Iterable[str] = LoadTest.model_fields
) -> dict[str, Any]:
    """Settings of an engine with the types they should have.

    where, also   for messages: who asks, and what else may be named there

    Raises UnknownField or InvalidField.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in SETTINGS:
            mend = f"Known: {', '.join((*SETTINGS, *also))}."
            raise UnknownField(where=where, field=name, mend=mend)
        if name in _COUNTS:
            try:
                number = int(value)
            except (TypeError, ValueError):
                number = 0
            if number < 1 or str(number) != str(value).strip():
                raise InvalidField(
                    where=where,
                    field=name,
                    value=value,
                    reason="not a whole number above 0",
                    mend="Write e.g. 4.",
                )
            found[name] = number
        elif name in _NAMES:
            found[name] = str(value)
        elif name == "formats":
            found[name] = _formats(value, where)
        elif name == "pipeline_layers":
            found[name] = _stages(value, where)
        elif name == "speculative":
            found[name] = _speculative(value, where)
        else:
            try:
                found[name] = float(value)
            except (TypeError, ValueError):
                found[name] = -1.0
            if not 0 < found[name] <= 1:
                raise InvalidField(
                    where=where,
                    field=name,
                    value=value,
                    reason="not a share between 0 and 1",
                    mend="Write 0.9.",
                )
    return found


def _stages(value: Any, where: str) -> list[int]:
    """Layers of each pipeline stage: a list, or text like "20/20/22/18"; none are the even split."""
    parts = re.split(r"[/,\s]+", value.strip("[] ")) if isinstance(value, str) else list(value)
    try:
        found = [int(part) for part in parts]
    except (TypeError, ValueError):
        found = [0]
    if min(found, default=1) < 1:
        raise InvalidField(
            where=where,
            field="pipeline_layers",
            value=value,
            reason="not the layers of each stage",
            mend="Write e.g. 20/20/22/18.",
        )
    return found


def _speculative(value: Any, where: str) -> dict[str, Any] | None:
    """One way of speculation, with the keys of `constraints.speculative` or of a replica: a mapping, or text
    like "method=mtp num_speculative_tokens=2 acceptance_rate=0.8" or YAML; None or "none" for none."""
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split()]
        text = f"{{{', '.join(f'{key}: {given}' for key, _, given in pairs)}}}" if "=" in value else value
        try:
            value = parsed_yaml(text)
        except yaml.YAMLError:
            raise InvalidField(
                where=where,
                field="speculative",
                value=value,
                reason="not a YAML value",
                mend="Write e.g. method=mtp num_speculative_tokens=2 acceptance_rate=0.8.",
            ) from None
    if value in (None, "none", {}):
        return None
    raw = dict(value) if isinstance(value, Mapping) else {"method": value}
    if "model" in raw:
        raw["draft_model"] = raw.pop("model")
    try:
        way = Speculative.model_validate(raw)
    except ValidationError as error:
        raise translated(error, Speculative, raw, f"{where}, speculative") from None
    if len(way.num_speculative_tokens) > 1:
        raise InvalidField(
            where=where,
            field="speculative.num_speculative_tokens",
            value=way.num_speculative_tokens,
            reason="one configuration drafts one number of tokens",
            mend="Write e.g. num_speculative_tokens: 2.",
        )
    return way.model_dump()


def _formats(value: Any, where: str) -> dict[str, str]:
    """Formats of parts: a mapping, or text like "decoder:self_attn=bf16/bf16 decoder:kv=fp8"."""
    pairs = [item.partition("=")[::2] for item in value.split()] if isinstance(value, str) else value
    found = dict(pairs)
    for part, taken in found.items():
        if parse(part) is None or not taken:
            raise InvalidField(
                where=where,
                field="formats",
                value=part,
                reason="not a part with what it takes",
                mend="Write e.g. decoder:self_attn=bf16/bf16.",
            )
        for name in scheme(taken):
            fmt(name, field=f"formats.{part}")
    return found
