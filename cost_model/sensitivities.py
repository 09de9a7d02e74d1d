"""The file of measured sensitivities: how much each part of a model suffers from each scheme alone.

`planc.sensitivities` writes it, a request names it (`constraints.sensitivities`). JSON:

    {"schema_version": 1, "model": "llama-3.1-8b", "tokens": 2048,
     "parts": [{"part": "decoder[0-7]:mlp", "scheme": "w4a16/bf16", "kl": 3.1e-4, "error": 0.012}, ...],
     "drops": {"w4a16/bf16": 0.013}}

`kl` is the mean Kullback-Leibler divergence of the next-token distribution, nats per token, `error` the
relative error of the logits. Divergences of small independent disturbances add up, which is what makes parts
comparable. `drops` is optional: relative loss of the task average with everything in a scheme, as an
evaluation found it; published averages stand in for what is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planc.cost_model.parts import Part, parse
from planc.cost_model.table import CostTable
from planc.errors import FileMissing, FileUnreadable, InvalidField
from planc.files import whole

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(_Entry):
    """One part in one scheme, everything else as it was."""

    part: str
    scheme: str
    kl: NonNegative
    error: NonNegative

    @property
    def where(self) -> Part:
        found = parse(self.part)
        assert found is not None, "checked when the file was read"
        return found


class Sensitivities(_Entry):
    """A whole file."""

    schema_version: Literal[1] = 1
    model: str
    tokens: int = Field(ge=1)
    parts: tuple[Measured, ...]
    drops: dict[str, NonNegative] = Field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        with whole(Path(path)) as file:
            file.write(self.to_json())

    def check(self, table: CostTable, where: str) -> None:
        """Raises InvalidField where a part is none of the model's."""
        layers = {cls.name: set(cls.layers) for cls in table.classes}
        for entry in self.parts:
            part = parse(entry.part)
            if (
                part is None
                or part.layer_class not in layers
                or not layers[part.layer_class] >= {*part.layers}
            ):
                raise InvalidField(
                    where=where,
                    field="parts",
                    value=entry.part,
                    reason=f"{table.model.name} has no such part",
                    mend="Measure this model with planc.sensitivities.",
                )


def load(path: str | Path) -> Sensitivities:
    """Reads a file. Raises FileMissing or FileUnreadable."""
    place = Path(path)
    if not place.is_file():
        raise FileMissing(what="sensitivities", path=path, mend="Write it with planc.sensitivities.")
    try:
        found = Sensitivities.model_validate_json(place.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise FileUnreadable(
            what="sensitivities", path=path, format="sensitivities", reason=reason, mend="Measure them anew."
        ) from None
    broken = next((entry.part for entry in found.parts if parse(entry.part) is None), None)
    if broken is not None:
        raise FileUnreadable(
            what="sensitivities",
            path=path,
            format="sensitivities",
            reason=f"'{broken}' names no part",
            mend="Parts are written class:module or class[layers]:module.",
        )
    return found
