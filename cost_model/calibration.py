"""The profile document: what was measured on one machine, or fitted to one deployment, as one JSON file.

    {"kind": "planc.profile", "schema_version": 1, "device": {...}, "tables": [...], ...}

`planc calibrate` writes it; `--profile FILE` and `planc.load_profile` read it. Every number carries what
it rests on: rows, the error of its fit, the range it was measured over. While a profile is in use
(`using`) its numbers take the place of the catalogue's, and plans carry another profile fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planc.cost_model import catalogue, overlay
from planc.cost_model.catalogue import Gpu, Precision, Provenance
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.profile import OpFamily, Profile, Table, TableInfo
from planc.errors import FileMissing, FileUnreadable, InvalidField, PlancError, UnknownField
from planc.files import whole

SCHEMA = 1
KIND = "planc.profile"

#: constants of serving that are no kernel's and no engine step's
Constant = Literal["request_ms", "lag_steps", "stream_interval", "recv_interval", "prompts_per_step"]


class Part(BaseModel):
    """Base of the document's parts: unknown keys, NaN and infinities are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Number(Part):
    """One measured or fitted number.

    rows         measurements it rests on
    error        median relative error on them (held-out ones where there are enough); None: not a fit
    low, high    what the number was measured over (sizes, concurrencies ...), in the units of `note`
    """

    value: float
    rows: int = Field(default=1, ge=1)
    error: float | None = Field(default=None, ge=0)
    low: float | None = None
    high: float | None = None
    source: Provenance = "measured"
    note: str = ""


class Machine(Part):
    """Where and with what the measurements were made."""

    system: str = ""
    processor: str = ""
    cores: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    memory_gib: float = Field(default=0.0, ge=0)
    versions: Mapping[str, str] = Field(default_factory=dict)


class Device(Part):
    """The hardware whose entry in the catalogue the profile changes.

    name             the catalogue's name for it
    entry            a whole entry, for hardware that the catalogue does not know
    peak_tflops      highest rate of a product in each precision
    memory_gbytes_s  highest rate of reading memory
    facts            plain facts of the device as the system states them: memory_gib, sm_count, l2_mib ...
    """

    name: str
    entry: Gpu | None = None
    peak_tflops: Mapping[Precision, Number] = Field(default_factory=dict)
    memory_gbytes_s: Number | None = None
    facts: Mapping[Literal["memory_gib", "sm_count", "l2_mib", "clock_mhz", "tdp_w", "idle_w"], float] = (
        Field(default_factory=dict)
    )

    def resolved(self) -> Gpu:
        """The entry with what was measured in it. Raises UnknownName."""
        base = self.entry or catalogue.gpu(self.name, field="device.name")
        raw = base.model_dump()
        raw["peak_tflops"] = {**base.peak_tflops, **{p: n.value for p, n in self.peak_tflops.items()}}
        if self.memory_gbytes_s is not None:
            raw["memory_gbytes_s"] = self.memory_gbytes_s.value
        return Gpu.model_validate({**raw, **self.facts})


class TableDocument(Part):
    """A table of `planc.cost_model.profile`, inline; `values` row by row in the order of `info.axes`."""

    family: OpFamily
    info: TableInfo
    axes: Mapping[str, tuple[float, ...]]
    values: tuple[float, ...]

    @model_validator(mode="after")
    def _shaped(self) -> TableDocument:
        if set(self.axes) != set(self.info.axes):
            raise ValueError(f"axes {sorted(self.axes)} are not the table's {sorted(self.info.axes)}")
        for name, axis in self.axes.items():
            if not axis or min(axis) <= 0 or any(b <= a for a, b in pairwise(axis)):
                raise ValueError(f"axis {name} does not ascend from above 0")
        wanted = math.prod(len(axis) for axis in self.axes.values())
        if len(self.values) != wanted:
            raise ValueError(f"{len(self.values)} values, the axes take {wanted}")
        return self

    def table(self) -> Table:
        axes = tuple(np.array(self.axes[name]) for name in self.info.axes)
        return Table(self.info, axes, np.array(self.values).reshape([axis.size for axis in axes]))


class ProfileDocument(Part):
    """A whole profile.

    device        what was measured, and the engine constants' home
    tables        measured kernels
    efficiencies  named efficiencies of the roofline on this device, per arithmetic or "any"
    engines       numeric cost fields of an engine's profile (`per_sequence_us`, `prefill_factor` ...)
    serving       constants by engine, or "any"
    """

    kind: Literal["planc.profile"]
    schema_version: Literal[1]
    planc_version: str
    date: str
    source: str = Field(description="the command that wrote it")
    machine: Machine = Field(default_factory=Machine)
    device: Device
    tables: tuple[TableDocument, ...] = ()
    efficiencies: Mapping[str, Mapping[Precision | Literal["any"], Number]] = Field(default_factory=dict)
    engines: Mapping[str, Mapping[str, Number]] = Field(default_factory=dict)
    serving: Mapping[str, Mapping[Constant, Number]] = Field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def text(self) -> str:
        """The file's content; the same profile gives the same text."""
        return (
            json.dumps(self.model_dump(mode="json", exclude_defaults=True), indent=1, sort_keys=True) + "\n"
        )

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        path = Path(path)
        if path.is_dir():
            raise FileUnreadable(
                what="profile",
                path=path,
                format="a file to write",
                reason="it is a folder",
                mend="Name a file.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as file:
            file.write(self.text())

    def overlay(self) -> overlay.Overlay:
        """Catalogue entries with this profile's numbers in them.

        Raises UnknownName for a GPU, engine or efficiency that does not exist, InvalidField for an engine
        field that is no number or a value that its entry refuses.
        """
        with overlay.in_use(None):
            gpu = self.device.resolved()
            known = efficiencies()
            named = dict(known.values)
            for name, values in self.efficiencies.items():
                if name not in named:
                    catalogue.unknown("efficiencies", name, "efficiency", named)
                own = {**named[name].by_gpu.get(gpu.name, {}), **{p: n.value for p, n in values.items()}}
                named[name] = named[name].model_copy(update={"by_gpu": {**named[name].by_gpu, gpu.name: own}})
            engines = dict(catalogue.engines())
            for name, fields in self.engines.items():
                engines[name] = _changed(catalogue.engine(name, field="engines"), fields)
            for name in self.serving:
                if name != "any":
                    catalogue.engine(name, field="serving")
            gpus = {**catalogue.gpus(), gpu.name: gpu}
        families = dict.fromkeys(document.family for document in self.tables)
        return overlay.Overlay(
            gpu=gpu.name,
            gpus=gpus,
            engines=engines,
            efficiencies=known.model_copy(update={"values": named}),
            tables={
                family: Profile(gpu.name, family, tuple(d.table() for d in self.tables if d.family == family))
                for family in families
            },
            serving={
                engine: {name: number.value for name, number in constants.items()}
                for engine, constants in self.serving.items()
            },
            fingerprint=self.fingerprint,
        )


def _changed(engine: catalogue.EngineProfile, fields: Mapping[str, Number]) -> catalogue.EngineProfile:
    raw = engine.model_dump()
    numeric = [name for name, value in raw.items() if type(value) in (int, float)]
    for name in fields:
        if name not in numeric:
            raise UnknownField(
                where=f"profile, engines.{engine.name}", field=name, mend=f"Known: {', '.join(numeric)}."
            )
    return type(engine).model_validate({**raw, **{name: number.value for name, number in fields.items()}})


def load_profile(path: str | Path) -> ProfileDocument:
    """Reads a profile and checks all of it, names included.

    Raises FileMissing, FileUnreadable, InvalidField, UnknownField or UnknownName.
    """
    path = Path(path)
    mend = "Write one with: planc calibrate --device -o FILE."
    if not path.is_file():
        raise FileMissing(what="profile", path=path, mend=mend)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileUnreadable(what="profile", path=path, format="JSON", reason=error, mend=mend) from None
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise FileUnreadable(
            what="profile", path=path, format="a profile", reason=f"its 'kind' is not {KIND!r}", mend=mend
        )
    if raw.get("schema_version") != SCHEMA:
        raise InvalidField(
            where=f"profile '{path}'",
            field="schema_version",
            value=raw.get("schema_version"),
            reason=f"this planc reads {SCHEMA}",
            mend="Calibrate again with this version.",
        )
    try:
        found = ProfileDocument.model_validate(raw)
        found.overlay()
    except ValidationError as error:
        raise _translated(error, path) from None
    return found


def _translated(error: ValidationError, path: Path) -> PlancError:
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    *parents, name = [str(part) for part in first["loc"]] or ["profile"]
    if first["type"] == "extra_forbidden":
        where = ".".join([f"profile '{path}'", *parents])
        return UnknownField(where=where, field=name, mend="Remove it, or calibrate again with this version.")
    return InvalidField(
        where=f"profile '{path}'",
        field=".".join([*parents, name]),
        value=_short(first["input"]),
        reason=first["msg"].removeprefix("Value error, "),
        mend="Correct it, or calibrate again.",
    )


def _short(value: Any) -> Any:
    return value if not isinstance(value, list | dict | tuple) or len(str(value)) < 80 else "..."


def require(gpus: Iterable[str], where: str) -> None:
    """Refuses the profile in use, if any, where its hardware is not among `gpus`. Raises InvalidField."""
    found = overlay.current()
    if found is None:
        return
    aliases = {alias: gpu.name for gpu in catalogue.gpus().values() for alias in gpu.aliases}
    names = list(dict.fromkeys(aliases.get(name, name) for name in gpus))
    if found.gpu not in names:
        raise InvalidField(
            where=where,
            field="device",
            value=found.gpu,
            reason=f"it was measured on {found.gpu}, and this is about {', '.join(names)}",
            mend="Use a profile of that hardware, or none.",
        )


@contextmanager
def using(profile: ProfileDocument | None) -> Iterator[None]:
    """Puts a profile's numbers in place of the catalogue's until the block ends; None changes nothing."""
    with overlay.in_use(overlay.current() if profile is None else profile.overlay()):
        yield
