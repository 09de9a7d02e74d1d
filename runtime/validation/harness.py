"""How a point was taken: its load generator and its engine's flags, from stated rules.

`harness.yaml` holds defaults and rules with their sources; a column of the points file wins over a rule, an
option of the command wins over both. No flag is ever inferred from the times that it explains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any

import yaml

from planc.cost_model import block_products, catalogue
from planc.errors import InvalidField, UnknownField
from planc.runtime.validation.names import architecture
from planc.runtime.validation.points import FLAGS, Point


@dataclass(frozen=True, slots=True)
class Harness:
    """burst                  all clients send their first request at once
    requests_per_client       requests of a run over its concurrency
    length_low, length_high   lengths are drawn evenly between these shares of the stated ones
    distinct_prompts          prompts that repeat in turn while the engine keeps their cache; None: all differ
    keeps_connections         clients keep their connections; otherwise they open one for every request
    stream_interval           tokens between two messages to the client; it sees the first with the n-th
    recv_interval             steps between two polls for arrivals
    asynchronous              a step is decided while another runs; None: as the engine does by default
    batch_wait_steps          steps that a prompt is held back for company
    prompts_per_step          most prompts in a step, None for no limit
    scheduling                "mixed" or "prefill_first", None for the engine's own
    max_num_batched_tokens    token budget of a step, None for the engine's default
    budget_beyond_prompt      where that is None: the budget is a prompt, one token per client, and so many
    max_num_seqs              None: the concurrency
    kv                        cache format, None for the engine's usual one
    gpu_memory_utilization    None for the engine's default
    speculative               name of the method, None for none; planc predicts without it
    dependent_launch          kernels start before those before them end (programmatic dependent launch)
    prompt_seats              prompts that a scheduler of the prefill pool holds at once; None: those of a
                              step, and one more
    prompt_router             how prompts are bound to one of its attention ranks on arrival: "round_robin",
                              "random_rank"; None: whatever waits is shared out at every step
    prompt_dp, prompt_ep      attention dp and expert parallelism of prefilling engines although labels say
                              otherwise; None: as labelled
    graphed_rows              rows up to which steps with prompts replay graphs; None: the engine's default
    expert_table              name of the measured table that stands for the routed experts' kernels which the
                              engine was told to run, e.g. sglang/fp8_block; None: its usual ones
    fp8_gemm_backend          kernels of fp8 products with a scale per block that the engine was told to run,
                              e.g. flashinfer_trtllm; None: its usual ones
    redundant_experts         second copies of experts that an engine keeps; 0: as few as fill its ranks
    expert_parallel           whole experts on ranks although labels say otherwise; None: as labelled
    """

    burst: bool
    requests_per_client: float
    length_low: float
    length_high: float
    stream_interval: int
    recv_interval: int
    batch_wait_steps: int
    asynchronous: bool | None = None
    distinct_prompts: int | None = None
    prompts_per_step: int | None = None
    scheduling: str | None = None
    max_num_batched_tokens: int | None = None
    budget_beyond_prompt: int | None = None
    max_num_seqs: int | None = None
    kv: str | None = None
    gpu_memory_utilization: float | None = None
    speculative: str | None = None
    expert_parallel: bool | None = None
    prompt_dp: int | None = None
    prompt_seats: int | None = None
    prompt_router: str | None = None
    prompt_ep: int | None = None
    graphed_rows: int | None = None
    expert_table: str | None = None
    fp8_gemm_backend: str | None = None
    redundant_experts: int = 0
    dependent_launch: bool = False
    keeps_connections: bool = False


NAMES = tuple(item.name for item in fields(Harness))

#: what flags of text may say
_CHOICES = {
    "scheduling": ("mixed", "prefill_first"),
    "fp8_gemm_backend": (block_products.NAME,),
    "prompt_router": ("round_robin", "random_rank"),
}
assert set(NAMES) == set(FLAGS)


@cache
def _document() -> Any:
    text = resources.files("planc.runtime.validation").joinpath("harness.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def hidden_launch_us() -> float:
    """What dependent launch hides of each kernel of a captured step, us."""
    return float(_document()["dependent_launch"]["hidden_us"])


def harness(point: Point, options: Mapping[str, Any] | None = None, *, rules: bool = True) -> Harness:
    """The harness of a point. Without `rules` only defaults, columns and options count.

    Raises UnknownField for an option that is none, InvalidField for a range of lengths that is empty.
    """
    document = _document()
    found = Harness(**document["defaults"])
    if rules:
        for rule in document["rules"]:
            if _applies(rule["when"], point):
                found = replace(found, **_told(rule["set"], point.concurrency))
    chosen = {**point.flags, **(options or {})}
    for name in chosen:
        if name not in NAMES:
            raise UnknownField(where="harness", field=name, mend=f"Known: {', '.join(NAMES)}.")
    found = replace(found, **chosen)
    for name, known in _CHOICES.items():
        if getattr(found, name) not in (None, *known):
            raise InvalidField(
                where="harness",
                field=name,
                value=getattr(found, name),
                reason=f"is not {' or '.join(known)}",
                mend="Name one of them.",
            )
    if not 0 < found.length_low <= found.length_high:
        raise InvalidField(
            where="harness",
            field="length_low",
            value=found.length_low,
            reason=f"not between 0 and length_high = {found.length_high}",
            mend="Give shares of the stated lengths, e.g. 0.8 and 1.0.",
        )
    return found


def _told(flags: Mapping[str, Any], concurrency: int) -> dict[str, Any]:
    """Flags of a rule; of those that it gives by concurrency the point's, none where it has none."""
    return {
        name: value[concurrency] if isinstance(value, Mapping) else value
        for name, value in flags.items()
        if not isinstance(value, Mapping) or concurrency in value
    }


def _applies(when: Mapping[str, Any], point: Point) -> bool:
    facts = {
        "engine": point.engine,
        "gpu": point.gpu,
        "arch": catalogue.gpu(point.gpu).arch,
        "model": architecture(point.model),
        "weights": point.weights,
        "mode": point.mode,
        "isl": point.isl,
        "osl": point.osl,
        "tp": point.tp,
        "attention_dp": point.attention_dp,
        "decode_dp": point.decode.dp if point.decode else point.attention_dp,
        "concurrency": point.concurrency,
        "prefill_dp": point.prefill.dp if point.prefill else 0,
        "prefill_ep": point.prefill.ep if point.prefill else 0,
    }
    for name, wanted in when.items():
        if name == "before_version":
            good = _version(point.engine_version) < _version(wanted)
        elif name.startswith("from_"):
            good = facts[name[5:]] >= wanted
        elif name.startswith("below_"):
            good = facts[name[6:]] < wanted
        else:
            inside = facts[name.removesuffix("_not")] in (wanted if isinstance(wanted, list) else [wanted])
            good = inside != name.endswith("_not")
        if not good:
            return False
    return True


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version; () for none."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
