"""What is known of a plan besides its decisions: `report.json` of a bundle, from which its report is drawn.

Where the time of its steps goes, op by op; the roofs of its GPUs; latencies at every percentile; what else
the search saw. None of it is part of the plan's identity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planc.errors import InvalidBundle
from planc.planner.plan import Provenance

Phase = Literal["prefill", "decode"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Op(_Part):
    """All calls of an op over the layers of one class in one step, on one GPU.

    flops, nbytes   of all calls; 0 for collectives and host time
    precision       of the units that the operations run on, "" where there are none
    """

    layer_class: str
    site: str
    op: str
    ms: float
    bound: Literal["compute", "memory", "launch", "link"]
    source: Provenance
    flops: float = 0.0
    nbytes: float = 0.0
    precision: str = ""


class Step(_Part):
    """A typical step of one kind of engine. `load` says what the step holds."""

    role: str
    engine: str
    gpu: str
    phase: Phase
    load: str
    ms: float
    ops: list[Op]


class Roof(_Part):
    """A GPU's limits: bytes/s of its memory, FLOP/s by precision (vendor peaks, dense)."""

    gpu: str
    bytes_s: float
    flops_s: dict[str, float]


class Curve(_Part):
    """A latency over requests: `ms[i]` is not exceeded by a share `levels[i]` of them."""

    metric: Literal["ttft", "tpot", "itl", "e2e"]
    of: str
    levels: list[float]
    ms: list[float]


class Seen(_Part):
    """A fleet that the search looked at: one kind of engine, as many as the load needs. `meets`: all
    objectives."""

    label: str
    values: dict[str, float]
    meets: bool = True


class Evidence(_Part):
    """`latency` is empty where nothing is streamed at a stated load."""

    schema_version: int = 1
    steps: list[Step] = Field(default_factory=list)
    roofs: list[Roof] = Field(default_factory=list)
    latency: list[Curve] = Field(default_factory=list)
    seen: list[Seen] = Field(default_factory=list)

    def canonical(self) -> str:
        """The document as it is written: nine significant digits."""
        from planc.planner.plan import canonical_json

        return canonical_json(self.model_dump(mode="json"))


def read(bundle: Path) -> Evidence | None:
    """What a bundle holds; None where there is nothing. Raises InvalidBundle."""
    place = bundle / "report.json"
    if not place.is_file():
        return None
    try:
        return Evidence.model_validate_json(place.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidBundle(
            path=bundle, reason=f"report.json: {reason}", mend="Compile the request again."
        ) from None
