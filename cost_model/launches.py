"""How many kernels a host launches for what is priced as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.kernels import Attention, GroupedGemm
from planc.cost_model.rank_ops import Collective, Kernel


class Launches:
    """Counts launches as an engine's profile says (`EngineProfile.launches`)."""

    def __init__(self, profile: EngineProfile) -> None:
        self._several = profile.launches

    def per_layer(self, item: Kernel | Collective) -> float:
        """For all calls in one layer."""
        if isinstance(item, Collective):
            return item.calls * self._several.get("collective", 0)
        spec, each = item.spec, 1
        if isinstance(spec, GroupedGemm):
            each = self._several.get(f"experts {spec.weights}") or self._several.get("experts", 1)
        elif isinstance(spec, Attention) and spec.latent and item.part == "prefill":
            each = self._several.get("latent", 1)
        return item.calls * item.launches * each

    def per_stage(
        self, items: Sequence[Kernel | Collective], counts: Sequence[int], order: Mapping[str, int]
    ) -> float:
        """Over a stage with so many layers of each class."""
        return sum(self.per_layer(item) * counts[order[item.layer_class]] for item in items)
