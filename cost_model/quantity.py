"""A number with its band and where it comes from; arithmetic that keeps both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planc.cost_model.catalogue import Provenance

#: from the best founded to the worst; a result is as good as its worst part
ORDER: tuple[Provenance, ...] = ("measured", "fitted", "roofline", "assumed")


def worst(sources: Iterable[Provenance]) -> Provenance:
    """The least well founded of the sources; "measured" for none."""
    return max(sources, key=ORDER.index, default="measured")


@dataclass(frozen=True, slots=True)
class Quantity:
    """`value` within [low, high]. Errors of the parts are taken as moving together, so bands add.

    Raises ValueError when low <= value <= high does not hold.
    """

    value: float
    low: float
    high: float
    source: Provenance

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} is not within [{self.low}, {self.high}]")

    @staticmethod
    def exact(value: float) -> Quantity:
        """A number that is counted, not estimated."""
        return Quantity(value, value, value, "measured")

    @staticmethod
    def within(value: float, band: tuple[float, float], source: Provenance) -> Quantity:
        """`band` are factors, e.g. (0.75, 1.35)."""
        ends = value * band[0], value * band[1]
        return Quantity(value, min(ends), max(ends), source)

    def __add__(self, other: Quantity) -> Quantity:
        return Quantity(
            self.value + other.value, self.low + other.low, self.high + other.high, self._with(other)
        )

    def __sub__(self, other: Quantity) -> Quantity:
        return Quantity(
            self.value - other.value, self.low - other.high, self.high - other.low, self._with(other)
        )

    def __mul__(self, other: Quantity | float) -> Quantity:
        if not isinstance(other, Quantity):
            other = Quantity.exact(other)
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Quantity(self.value * other.value, min(ends), max(ends), self._with(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Quantity | float) -> Quantity:
        """Raises ZeroDivisionError when the divisor's band holds zero."""
        if not isinstance(other, Quantity):
            other = Quantity.exact(other)
        if other.low <= 0 <= other.high:
            raise ZeroDivisionError(f"division by {other}")
        ends = [a / b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Quantity(self.value / other.value, min(ends), max(ends), self._with(other))

    def max(self, other: Quantity) -> Quantity:
        """The larger of two, e.g. of a compute and a memory bound."""
        return Quantity(
            max(self.value, other.value),
            max(self.low, other.low),
            max(self.high, other.high),
            self._with(other),
        )

    def _with(self, other: Quantity) -> Provenance:
        return worst((self.source, other.source))
