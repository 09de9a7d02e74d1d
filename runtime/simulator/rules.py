"""The rules of one engine: its scheduler's, and what lies between it and its clients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from planc.cost_model import overlay
from planc.cost_model.catalogue import EngineProfile
from planc.errors import InvalidField
from planc.planner.priors import priors, way
from planc.runtime.scheduler import Limits


@dataclass(frozen=True, slots=True)
class Speculation:
    """Draft tokens verified in one step.

    draft        tokens drafted per sequence and step
    acceptance   chance that a draft token is accepted, given that those before it were
    draft_s      seconds of drafting per step, beside the verified step itself
    each_s       and for each decoding sequence
    """

    draft: int
    acceptance: float
    draft_s: float = 0.0
    each_s: float = 0.0

    def __post_init__(self) -> None:
        for name, good in (("draft", self.draft >= 1), ("acceptance", 0 <= self.acceptance <= 1)):
            if not good:
                raise InvalidField(
                    where="speculation",
                    field=name,
                    value=getattr(self, name),
                    reason="a step drafts at least one token, and accepts it with a chance from 0 to 1",
                    mend="Correct it, or serve without speculation.",
                )

    @property
    def tokens(self) -> float:
        """Mean tokens of a sequence per step: 1 + a + a^2 + ... + a^draft (Leviathan et al., ICML 2023)."""
        return sum(self.acceptance**k for k in range(self.draft + 1))


@dataclass(frozen=True, slots=True)
class Rules(Limits):
    """Scheduler limits, and the times at which an engine listens and speaks.

    stream_interval   tokens per message: a client sees the first with the n-th
    recv_interval     steps between looks at new arrivals
    request_ms        a request's way to the scheduler: network, tokenizer, admission
    intake_ms         of a server's frontend for each request, one after another: parsing, tokenizing
    intake_us         the same per token of its prompt
    lag_steps         steps from a token's kernels to its client
    stream_us         of a server's frontend for each message to a client, one after another
    asynchronous      a step is decided while the one before it runs: an arrival waits for the rest of the
                      running step and for all of the next
    prefix_caching    prompts' blocks outlive their requests
    speculative       drafts; they set tokens_per_step
    adapter_ms        to load a LoRA adapter that is not on the device
    swap_s_per_token  to move one token's cache between device and host
    """

    stream_interval: int = 1
    recv_interval: int = 1
    request_ms: float = 0.0
    intake_ms: float = 0.0
    intake_us: float = 0.0
    lag_steps: float = 0.0
    stream_us: float = 0.0
    asynchronous: bool = False
    prefix_caching: bool = False
    speculative: Speculation | None = None
    adapter_ms: float = 0.0
    swap_s_per_token: float = 0.0

    def __post_init__(self) -> None:
        Limits.__post_init__(self)
        for name, least in (
            ("stream_interval", 1),
            ("recv_interval", 1),
            ("request_ms", 0),
            ("intake_ms", 0),
            ("intake_us", 0),
            ("lag_steps", 0),
            ("stream_us", 0),
        ):
            value = getattr(self, name)
            if not value >= least:
                raise InvalidField(
                    where="rules",
                    field=name,
                    value=value,
                    reason=f"must be at least {least}",
                    mend="Raise it.",
                )
        if self.speculative is not None:
            object.__setattr__(self, "tokens_per_step", self.speculative.tokens)
            object.__setattr__(self, "rows_per_step", 1 + self.speculative.draft)

    def offline(self) -> Rules:
        """The same engine without a server before it: prompts are there as tokens, answers are handed over
        whole, nothing lies between a step's end and the caller."""
        return replace(
            self,
            request_ms=0.0,
            intake_ms=0.0,
            intake_us=0.0,
            lag_steps=0.0,
            stream_us=0.0,
            stream_interval=1,
        )

    @staticmethod
    def of(
        profile: EngineProfile,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        **changes: Any,
    ) -> Rules:
        """An engine's rules by its profile, with its default limits or these; `changes` name fields.

        What no profile states (request_ms, lag_steps) is as in the planner's priors, or in the measured
        profile in use.
        """
        serving, used = profile.serving, overlay.current()
        request_s, lag_steps = way(profile)
        fields: dict[str, Any] = {
            "max_num_seqs": max_num_seqs or profile.max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens or profile.max_num_batched_tokens,
            "scheduling": profile.scheduling,
            "chunked": serving.chunked_prefill,
            "prompts_per_step": serving.prompts_per_step,
            "reserved_output": 1.0 if profile.reserves_output else serving.reserved_output,
            "reserved_floor": None if profile.reserves_output else serving.reserved_floor,
            "reserved_steps": serving.reserved_steps,
            "preemption": serving.preemption,
            "stream_interval": serving.stream_interval,
            "recv_interval": serving.recv_interval,
            "request_ms": request_s * 1e3,
            "intake_ms": priors().intake_ms,
            "intake_us": priors().intake_us,
            "lag_steps": lag_steps,
            "stream_us": serving.stream_us,
            "asynchronous": profile.overlaps_host,
        }
        for name in ("stream_interval", "recv_interval", "prompts_per_step"):
            measured = used.constant(name, profile.name) if used else None
            if measured is not None:
                fields[name] = round(measured)
        return Rules(**(fields | changes))
