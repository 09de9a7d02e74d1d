"""The planner's own constants, read from `priors.yaml` (value, source and date lie there)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

import yaml

from planc.cost_model import overlay
from planc.cost_model.catalogue import Provenance


@dataclass(frozen=True, slots=True)
class Priors:
    """request_s, lag_steps   what TTFT holds besides waiting and prompt steps
    ttft_band                 factors around TTFT beyond the band of the step time
    kv_margin_sd              standard deviations of cache demand kept free
    stable                    highest share of time that prompt processing may take
    power_band                factors around the power model
    serving                   factors around TPOT, TTFT and throughput of a load test, by metric
    wider                     powers of those, by how well founded the kernels are
    """

    request_s: float
    lag_steps: float
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


def priors() -> Priors:
    """The priors; with the serving constants of the measured profile in use, if any."""
    found, used = _shipped(), overlay.current()
    if used is None:
        return found
    request, lag = used.constant("request_ms"), used.constant("lag_steps")
    return replace(
        found,
        request_s=found.request_s if request is None else request / 1e3,
        lag_steps=found.lag_steps if lag is None else lag,
    )


@cache
def _shipped() -> Priors:
    raw = yaml.safe_load(text())
    ttft, queueing = raw["ttft"], raw["queueing"]
    return Priors(
        request_s=ttft["request_ms"] / 1e3,
        lag_steps=float(ttft["lag_steps"]),
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
