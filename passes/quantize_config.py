"""What the `quantization_config` of a checkpoint's config.json says, for one format or for several.

A recipe is a plan's formats as a checkpoint sees them: the usual scheme, and rules for modules of some
layers. In compressed-tensors' words the usual scheme is the group that targets "Linear", every rule a group
whose targets are regular expressions over module names, which engines look at first. What a rule leaves in
16 bits is ignored.

Imports no torch: the same words go into an engine's files and into a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from planc.cost_model.parts import module_of_weight
from planc.errors import InvalidField, UnknownName

#: elements of a group in 4-bit integer formats
INT4_GROUP = 128

Scheme = tuple[str, str]

#: a plan's (weights, activations) -> the checkpoint that engines load for it
CHECKPOINTS: dict[Scheme, str] = {
    ("fp8", "fp8"): "fp8",
    ("fp8", "bf16"): "fp8_weights",
    ("int8", "int8"): "w8a8",
    ("int8", "bf16"): "int8",
    ("int8", "fp16"): "int8",
    ("w4a16", "bf16"): "w4a16",
    ("w4a16", "fp16"): "w4a16",
}

#: checkpoint -> layout, bits, type, strategy, whether activations are rounded too
_COMPRESSED: dict[str, tuple[str, int, str, str, bool]] = {
    "fp8": ("float-quantized", 8, "float", "channel", True),
    "fp8_weights": ("float-quantized", 8, "float", "channel", False),
    "w8a8": ("int-quantized", 8, "int", "channel", True),
    "int8": ("pack-quantized", 8, "int", "channel", False),
    "w4a16": ("pack-quantized", 4, "int", "group", False),
}
_OTHER = ("awq", "gptq")
_WIDE = ("bf16", "fp16", "fp32")

#: modules that checkpoints and engines call otherwise than transformers' classes do
_ALIASES = {"mlp": ("mlp", "block_sparse_moe")}


@dataclass(frozen=True, slots=True)
class Rule:
    """Matrices of `module` in `layers` take a scheme of their own."""

    module: str
    layers: tuple[int, ...]
    scheme: Scheme

    @property
    def pattern(self) -> str:
        """Their modules' names, as a regular expression that matches from the start."""
        names = "|".join(str(layer) for layer in self.layers)
        first, dot, rest = self.module.partition(".")
        known = _ALIASES.get(first, (first,))
        path = (known[0] if len(known) == 1 else f"(?:{'|'.join(known)})") + (dot + rest).replace(".", r"\.")
        return rf".*\.(?:{names})\.{path}\.(?:\d+\.)*[^.]+$"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The scheme of every matrix of a checkpoint that a weight format applies to."""

    usual: Scheme
    rules: tuple[Rule, ...] = ()

    def rule(self, module: str) -> Rule | None:
        """The rule for a module called e.g. "model.layers.3.self_attn.q_proj"; None for the usual scheme."""
        layer, inside = _inside(module)
        held = module_of_weight(f"{inside}.weight")
        return next((r for r in self.rules if layer in r.layers and held in _names(r.module)), None)

    def checkpoint(self, module: str) -> str | None:
        """The kind of checkpoint tensors of a module; None where it stays as it is. Raises InvalidField for
        a scheme that checkpoints of no kind hold."""
        rule = self.rule(module)
        return checkpoint_of(self.usual if rule is None else rule.scheme)

    @property
    def packs(self) -> bool:
        """Whether any matrix changes."""
        return any(checkpoint_of(one) for one in (self.usual, *(rule.scheme for rule in self.rules)))

    def __str__(self) -> str:
        """The kinds of tensors, e.g. "fp8 and w4a16"."""
        schemes = (self.usual, *(rule.scheme for rule in self.rules))
        return " and ".join(dict.fromkeys(filter(None, map(checkpoint_of, schemes))))


def checkpoint_of(scheme: Scheme) -> str | None:
    """A scheme's kind of checkpoint, None for what is not quantized. Raises InvalidField."""
    if scheme[0] in _WIDE:
        return None
    if scheme not in CHECKPOINTS:
        raise InvalidField(
            where="checkpoint",
            field="formats",
            value="/".join(scheme),
            reason="planc writes no checkpoint of this format",
            mend=f"It writes {', '.join('/'.join(one) for one in CHECKPOINTS)}.",
        )
    return CHECKPOINTS[scheme]


def recipe_config(recipe: Recipe, ignore: Iterable[str], group: int = INT4_GROUP) -> dict[str, Any]:
    """The `quantization_config` of a recipe. `ignore`: modules that stay as they are. Raises InvalidField."""
    usual = checkpoint_of(recipe.usual)
    if not recipe.rules and usual is not None:
        return checkpoint_config(usual, ignore, group)
    kept, targets = sorted(ignore), dict[str, list[str]]()
    for rule in recipe.rules:
        kind = checkpoint_of(rule.scheme)
        (kept if kind is None else targets.setdefault(kind, [])).append(f"re:{rule.pattern}")
    if usual is not None:
        targets.setdefault(usual, []).append("Linear")
    layouts = {_COMPRESSED[kind][0] for kind in targets}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {
            f"group_{number}": {"format": _COMPRESSED[kind][0], **_group(kind, names, group)}
            for number, (kind, names) in enumerate(targets.items())
        },
    }


def checkpoint_config(checkpoint: str, ignore: Iterable[str], group: int = INT4_GROUP) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint of one kind. Raises UnknownName."""
    known(checkpoint)
    kept = sorted(ignore)
    if checkpoint == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": kept,
        }
    if checkpoint == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": group,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in kept},
        }
    return {
        "quant_method": "compressed-tensors",
        "format": _COMPRESSED[checkpoint][0],
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {"group_0": _group(checkpoint, ["Linear"], group)},
    }


def known(checkpoint: str) -> str:
    """The name itself. Raises UnknownName where it is no kind of checkpoint."""
    names = (*_COMPRESSED, *_OTHER)
    if checkpoint not in names:
        mend = f"Known: {', '.join(names)}."
        raise UnknownName(field="checkpoint", value=checkpoint, kind="checkpoint format", mend=mend)
    return checkpoint


def _group(checkpoint: str, targets: Sequence[str], group: int) -> dict[str, Any]:
    _, bits, kind, strategy, activations = _COMPRESSED[checkpoint]
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
    }
    if strategy == "group":
        weights["group_size"] = group
    dynamic = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": dynamic if activations else None,
    }


def _names(module: str) -> Iterable[str]:
    """A module's path, under the names that checkpoints may give it."""
    first, dot, rest = module.partition(".")
    return (f"{name}{dot}{rest}" for name in _ALIASES.get(first, (first,)))


def _inside(module: str) -> tuple[int | None, str]:
    """The layer's number and the path inside it; None outside the layers."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (None, module) if at is None else (int(parts[at]), ".".join(parts[at + 1 :]))
