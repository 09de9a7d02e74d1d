"""What a measured profile puts in place of the catalogue, for as long as it is in use.

The catalogue's readers (`gpus`, `engines`, `efficiencies`, `profile.shipped`) ask `current()` first. An
overlay holds whole entries, not changes, so a reader needs nothing but a look-up, and nothing that a
reader caches can hold another profile's numbers. `planc.cost_model.calibration` makes overlays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planc.cost_model.catalogue import EngineProfile, Gpu
    from planc.cost_model.efficiency import Efficiencies
    from planc.cost_model.profile import OpFamily, Profile


@dataclass(frozen=True, slots=True, eq=False)
class Overlay:
    """gpu           name of the hardware that was measured
    gpus, engines    all entries of the catalogue, changed ones in their place
    tables           measured tables by op family, of `gpu` alone
    serving          constants by engine (or "any"), then by name
    fingerprint      hash of the profile
    """

    gpu: str
    gpus: Mapping[str, Gpu]
    engines: Mapping[str, EngineProfile]
    efficiencies: Efficiencies
    tables: Mapping[OpFamily, Profile]
    serving: Mapping[str, Mapping[str, float]]
    fingerprint: str

    def constant(self, name: str, engine: str | None = None) -> float | None:
        """A serving constant: the engine's own, else the one for any engine, else None. Without an engine,
        the one for any, or that of the only engine that the profile knows."""
        only = next(iter(self.serving)) if engine is None and len(self.serving) == 1 else engine
        own = self.serving.get(only or "any", {}).get(name)
        return self.serving.get("any", {}).get(name) if own is None else own


_in_use: ContextVar[Overlay | None] = ContextVar("overlay", default=None)


def current() -> Overlay | None:
    """The overlay in use in this context, if any."""
    return _in_use.get()


@contextmanager
def in_use(overlay: Overlay | None) -> Iterator[None]:
    """Puts an overlay in use (None: the catalogue as shipped) until the block ends."""
    token = _in_use.set(overlay)
    try:
        yield
    finally:
        _in_use.reset(token)
