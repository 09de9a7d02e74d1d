"""The few constants of serving that no kernel table holds, as one vector: what fits may move.

step_us          host time per step                    per_sequence_us  host time per sequence and step
layer_us         per layer and step, of either sign: what a sum of kernels measured alone gets wrong
kernel_factor    on the time of all kernels
prefill_factor   on what prompts add to a step
request_ms       network, tokenizer, admission         lag_steps        steps until a token reaches its client
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.features import Array
from planc.planner.priors import way


@dataclass(frozen=True, slots=True)
class Constants:
    """Values in the units of their names."""

    step_us: float
    layer_us: float
    per_sequence_us: float
    kernel_factor: float
    prefill_factor: float
    request_ms: float
    lag_steps: float

    @staticmethod
    def shipped(profile: EngineProfile) -> Constants:
        """What planc plans with for this engine: the profile's, a calibration's where one is in use."""
        request_s, lag_steps = way(profile)
        return Constants(
            step_us=profile.step_us,
            layer_us=profile.layer_us,
            per_sequence_us=profile.per_sequence_us,
            kernel_factor=profile.kernel_factor,
            prefill_factor=profile.prefill_factor,
            request_ms=request_s * 1e3,
            lag_steps=lag_steps,
        )

    def on(self, profile: EngineProfile) -> EngineProfile:
        """The engine's profile with these step constants."""
        return profile.model_copy(
            update={
                "step_us": self.step_us,
                "layer_us": self.layer_us,
                "per_sequence_us": self.per_sequence_us,
                "kernel_factor": self.kernel_factor,
                "prefill_factor": self.prefill_factor,
            }
        )

    def vector(self) -> Array:
        return np.array([getattr(self, name) for name in NAMES])

    def moved(self, change: Array) -> Constants:
        """These constants plus a vector in the order of `NAMES`; no wait is shorter than none."""
        moved = dict(zip(NAMES, (self.vector() + change).tolist(), strict=True))
        waits = {name: max(moved[name], 0.0) for name in ("request_ms", "lag_steps")}
        return replace(self, **(moved | waits))


NAMES = tuple(item.name for item in fields(Constants))
