"""Measured profiles: tables of how far kernels are from an ideal, small enough to ship.

A profile file holds the tables of one op family on one GPU (`data/profiles/<family>/<gpu>.npz`).
A table's values are natural logarithms of measured time over the time of a simple ideal that the
family's module defines (`planc.cost_model.measured.*`), computed with the peaks that the file itself
states; so a file stays true when catalogue entries or efficiencies change, and off its range the
ideal extrapolates. Values are stored as 16-bit integers of 1/1000 nat (0.1 %).

`planc.cost_model.fitting` writes these files from measurements.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from planc.cost_model.catalogue import Entry
from planc.cost_model.features import Array
from planc.errors import InvalidField

#: version of the file's layout
SCHEMA = 2

OpFamily = Literal["gemm", "attention", "experts", "links", "pointwise"]

_STEP = 1e-3  # nat per stored unit
_MISSING = np.iinfo(np.int16).min


class TableInfo(Entry):
    """What a reader must know of one table.

    name          unique in the file
    key           what the table is for, in the family's own words (engine, format, head_dim, ...)
    axes          names of the table's axes, in the order of its dimensions
    ideal         peaks that the family's ideal was computed with (flop/s, bytes/s, seconds)
    rows          measured rows it was made from; `dropped` were set aside, for the reasons in `note`
    error         median relative error on rows that were held out of it
    """

    name: str
    key: Mapping[str, str | float | int]
    axes: tuple[str, ...]
    ideal: Mapping[str, float] = Field(default_factory=dict)
    rows: int
    dropped: int = 0
    error: float
    source: str
    date: str
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One table: `values[i, j, ...]` at `axes[0][i], axes[1][j], ...`; further arrays by name."""

    info: TableInfo
    axes: tuple[Array, ...]
    values: Array
    extra: Mapping[str, Array] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        return Grid(self.axes, self.values)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Multilinear interpolation in the logarithms of all axes; beyond an end, that end's value."""

    axes: tuple[Array, ...]
    values: Array

    def at(self, *coords: npt.ArrayLike) -> Array:
        """Values at coordinates that broadcast against each other."""
        points = np.broadcast_arrays(*(np.asarray(c, dtype=np.float64) for c in coords))
        shape, size = points[0].shape, points[0].size
        found = np.zeros(size)
        low, part = [], []
        for axis, values in zip(self.axes, points, strict=True):
            index, share = _between(np.log(axis), np.log(np.maximum(values.reshape(-1), 1e-30)))
            low.append(index)
            part.append(share)
        strides = np.array(self.values.strides) // self.values.itemsize
        flat = self.values.reshape(-1)
        for corner in range(1 << len(self.axes)):
            weight, where = np.ones(size), np.zeros(size, dtype=np.intp)
            for d, axis in enumerate(self.axes):
                up = corner >> d & 1
                weight *= part[d] if up else 1.0 - part[d]
                where += np.minimum(low[d] + up, axis.size - 1) * strides[d]
            found += np.where(weight > 0, flat[where], 0.0) * weight
        return found.reshape(shape)

    def inside(self, *coords: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether all coordinates lie between the ends of their axes."""
        found: Any = True
        for axis, value in zip(self.axes, coords, strict=True):
            found = found & (np.asarray(value) >= axis[0]) & (np.asarray(value) <= axis[-1])
        return np.asarray(found)


def _between(axis: Array, at: Array) -> tuple[npt.NDArray[np.intp], Array]:
    """The lower neighbour on an ascending axis, and how far `at` is towards the upper one (0 to 1)."""
    if axis.size == 1:
        return np.zeros(at.size, dtype=np.intp), np.zeros(at.size)
    index = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, axis.size - 2)
    return index, np.clip((at - axis[index]) / (axis[index + 1] - axis[index]), 0.0, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """The tables of one op family on one GPU."""

    gpu: str
    family: OpFamily
    tables: tuple[Table, ...]

    def find(self, **key: str | float | int) -> tuple[Table, ...]:
        """Tables whose key agrees with all the given items."""
        return tuple(t for t in self.tables if all(t.info.key.get(k) == v for k, v in key.items()))

    def to_bytes(self) -> bytes:
        """The file's content; the same tables give the same bytes. All tables' values lie in one array, all
        axes and further arrays in another, and the head says how long each is."""
        values: list[npt.NDArray[np.int16]] = []
        numbers: list[npt.NDArray[np.float32]] = []
        sizes = []
        for table in self.tables:
            scaled = np.clip(np.round(table.values / _STEP), -32767, 32767)
            values.append(np.where(np.isnan(table.values), _MISSING, scaled).astype(np.int16).reshape(-1))
            numbers.extend(a.astype(np.float32).reshape(-1) for a in (*table.axes, *table.extra.values()))
            extra = {name: list(array.shape) for name, array in table.extra.items()}
            sizes.append({"axes": [axis.size for axis in table.axes], "extra": extra})
        head = {
            "schema": SCHEMA,
            "gpu": self.gpu,
            "family": self.family,
            "tables": [table.info.model_dump(mode="json") for table in self.tables],
            "sizes": sizes,
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        out = io.BytesIO()
        np.savez_compressed(
            out,
            head=np.frombuffer(text, dtype=np.uint8),
            values=np.concatenate([*values, np.zeros(0, dtype=np.int16)]),
            numbers=np.concatenate([*numbers, np.zeros(0, dtype=np.float32)]),
        )
        return out.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Profile:
        with np.load(io.BytesIO(data), allow_pickle=False) as raw:
            head = json.loads(raw["head"].tobytes())
            if head["schema"] != SCHEMA:
                raise InvalidField(
                    where="measured profile",
                    field="schema",
                    value=head["schema"],
                    reason=f"this planc reads {SCHEMA}",
                    mend="Fit the profile again with this planc.",
                )
            values = _Reader(raw["values"])
            numbers = _Reader(raw["numbers"].astype(np.float64))
        tables = []
        for entry, sizes in zip(head["tables"], head["sizes"], strict=True):
            stored = values.next(sizes["axes"])
            decoded = np.where(stored == _MISSING, np.nan, stored.astype(np.float64) * _STEP)
            axes = tuple(numbers.next([size]) for size in sizes["axes"])
            extra = {name: numbers.next(shape) for name, shape in sizes["extra"].items()}
            tables.append(Table(TableInfo(**entry), axes, decoded, extra))
        return Profile(head["gpu"], head["family"], tuple(tables))


class _Reader:
    """Takes arrays off the front of a flat one."""

    def __init__(self, flat: npt.NDArray[Any]) -> None:
        self.flat, self.at = flat, 0

    def next(self, shape: Sequence[int]) -> npt.NDArray[Any]:
        start, self.at = self.at, self.at + int(np.prod(shape))
        return self.flat[start : self.at].reshape(shape)


@cache
def shipped(family: OpFamily, gpu: str) -> Profile | None:
    """The profile that planc ships for a family on a GPU; None where nothing was measured."""
    file = resources.files("planc.cost_model.data").joinpath("profiles", family, f"{gpu}.npz")
    return expect(Profile.from_bytes(file.read_bytes()), family, gpu) if file.is_file() else None


def expect(profile: Profile, family: OpFamily, gpu: str) -> Profile:
    """The profile, if it is of this family and GPU. Raises InvalidField."""
    for name, value, wanted in (("gpu", profile.gpu, gpu), ("family", profile.family, family)):
        if value != wanted:
            raise InvalidField(
                where="measured profile",
                field=name,
                value=value,
                reason=f"a profile of {wanted} was asked for",
                mend="Numbers of one GPU say nothing of another: take its own profile, or none.",
            )
    return profile


def write(profile: Profile, folder: Path) -> Path:
    """Writes `<folder>/<family>/<gpu>.npz`."""
    path = folder / profile.family / f"{profile.gpu}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(profile.to_bytes())
    return path
