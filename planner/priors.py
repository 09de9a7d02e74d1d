"""The planner's own constants, read from `priors.yaml` (value, source and date lie there)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from planc.cost_model import overlay
from planc.cost_model.catalogue import EngineProfile, Provenance
from planc.cost_model.step import StepModel


@dataclass(frozen=True, slots=True)
class Priors:
    """request_s, lag_steps   what TTFT holds besides waiting and prompt steps; see `way`
    intake_ms, intake_us      a frontend's time for one request, and per token of its prompt: one at a time
    kept_request_ms           a request's way to the scheduler where clients keep their connections
    ttft_band                 factors around TTFT beyond the band of the step time
    kv_margin_sd              standard deviations of cache demand kept free
    stable                    highest share of time that prompt processing may take
    power_band                factors around the power model
    serving                   factors around TPOT, TTFT and throughput of a load test, by metric
    wider                     powers of those, by how well founded the kernels are
    """

    request_s: float
    lag_steps: float
    intake_ms: float
    intake_us: float
    kept_request_ms: float
    ttft_band: tuple[float, float]
    kv_margin_sd: float
    stable: float
    power_band: tuple[float, float]
    serving: Mapping[str, tuple[float, float]]
    wider: Mapping[str, float]

    def serving_bands(self, source: Provenance) -> dict[str, tuple[float, float]]:
        """(low, high) factors of tpot, ttft and throughput of a load test."""
        power = self.wider[source]
        return {name: (low**power, high**power) for name, (low, high) in self.serving.items()}


def text() -> str:
    """The data file, for fingerprints."""
    return resources.files("planc.planner").joinpath("priors.yaml").read_text(encoding="utf-8")


def way(engine: EngineProfile) -> tuple[float, float]:
    """(request_s, lag_steps) of an engine: of the measured profile in use, else its own, else the priors."""
    known, used = priors(), overlay.current()
    own = engine.serving.request_ms
    request = used.constant("request_ms", engine.name) if used else None
    lag = used.constant("lag_steps", engine.name) if used else None
    if request is None:
        request = known.request_s * 1e3 if own is None else own
    return request / 1e3, known.lag_steps if lag is None else lag


def waits(model: StepModel) -> tuple[float, float]:
    """(request_s, steps) that a request waits besides its own steps and those before them: an engine that
    decides a step while another runs takes it one step later."""
    request_s, lag_steps = way(model.profile)
    return request_s, lag_steps + model.asynchronous


@cache
def priors() -> Priors:
    raw = yaml.safe_load(text())
    ttft, queueing = raw["ttft"], raw["queueing"]
    return Priors(
        request_s=ttft["request_ms"] / 1e3,
        lag_steps=float(ttft["lag_steps"]),
        intake_ms=float(ttft["intake_ms"]),
        intake_us=float(ttft["intake_us"]),
        kept_request_ms=float(ttft["kept_request_ms"]),
        ttft_band=(ttft["low"], ttft["high"]),
        kv_margin_sd=queueing["kv_margin_sd"],
        stable=queueing["stable"],
        power_band=(raw["power"]["low"], raw["power"]["high"]),
        serving={
            name: (raw["serving"][name]["low"], raw["serving"][name]["high"])
            for name in ("tpot", "ttft", "throughput")
        },
        wider=raw["serving"]["wider"],
    )
