"""The widths a model's kernels run at, read from its Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planc.codegen.triton.kinds import Kind

#: Configuration keys that give the width of a gated activation, by what they are the width of.
_GATED = (
    "intermediate_size",
    "moe_intermediate_size",
    "intermediate_size_mlp",
    "shared_expert_intermediate_size",
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Distinct widths: of normalised rows, of gated activations per rank, and (head, rotary) widths."""

    norms: tuple[int, ...] = ()
    gated: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(config: Mapping[str, Any] | None, tps: Iterable[int]) -> Sizes:
        """Reads what the configuration states; a key it lacks gives no size.

        Gated widths are divided by each tensor-parallel degree that divides them.
        """
        if not config:
            return Sizes()
        text = config.get("text_config") or config
        hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
        widths = {int(text[key]) for key in _GATED if isinstance(text.get(key), int)}
        head = text.get("head_dim") or (hidden // heads if hidden and heads else None)
        head_dims = {int(d) for d in (head, text.get("global_head_dim")) if d}
        return Sizes(
            norms=(int(hidden),) if hidden else (),
            gated=tuple(sorted({w // tp for w in widths for tp in tps if w % tp == 0})),
            heads=tuple(sorted((d, _rotary(text, d)) for d in head_dims)),
        )

    def of_kind(self, kind: Kind) -> tuple[Mapping[str, int], ...]:
        """Arguments of `configure` for each shape a kind runs at."""
        match kind.template:
            case "rms_norm.py.jinja":
                return tuple({"n": n} for n in self.norms)
            case "gated.py.jinja":
                return tuple({"n": n} for n in self.gated)
            case _:
                return tuple({"head_dim": d, "rotary": r} for d, r in self.heads)


def _rotary(text: Mapping[str, Any], head_dim: int) -> int:
    """Rotated elements of a head: `rotary_dim`, or `partial_rotary_factor` of the head."""
    parameters = text.get("rope_parameters") or {}
    factor = text.get("partial_rotary_factor") or parameters.get("partial_rotary_factor") or 1.0
    return min(head_dim, int(text.get("rotary_dim") or head_dim * float(factor)))
