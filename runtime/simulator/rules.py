"""The rules of one engine: its scheduler's, and what lies between it and its clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planc.cost_model.catalogue import EngineProfile
from planc.runtime.scheduler import Limits


@dataclass(frozen=True, slots=True)
class Speculation:
    """Draft tokens verified in one step.

    draft        tokens drafted per sequence and step
    acceptance   chance that a draft token is accepted, given that those before it were
    draft_s      seconds of drafting per step, beside the verified step itself
    """

    draft: int
    acceptance: float
    draft_s: float = 0.0

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
    lag_steps         steps from a token's kernels to its client
    prefix_caching    prompts' blocks outlive their requests
    """

    stream_interval: int = 1
    recv_interval: int = 1
    request_ms: float = 0.0
    lag_steps: float = 0.0
    prefix_caching: bool = False
    speculative: Speculation | None = None
    adapter_ms: float = 0.0
    swap_s_per_token: float = 0.0

    @staticmethod
    def of(
        profile: EngineProfile,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        **changes: Any,
    ) -> Rules:
        """An engine's rules by its profile, with its default limits or these; `changes` name fields."""
        fields: dict[str, Any] = {
            "max_num_seqs": max_num_seqs or profile.max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens or profile.max_num_batched_tokens,
            "scheduling": profile.scheduling,
            "reserved_output": 1.0 if profile.reserves_output else 0.0,
        }
        return Rules(**(fields | changes))
