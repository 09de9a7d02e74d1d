"""From a plan to the text of its kernels. Loads neither torch nor triton.

The plan names what was fused in each layer class; `called_for` says which kernels that needs. The model's
configuration, where given, supplies the widths that a check compiles the kernels for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from planc.codegen.triton.kernel import Kernel
from planc.codegen.triton.kinds import ACTIVATIONS, KINDS, Kind
from planc.codegen.triton.sizes import Sizes
from planc.planner.plan import Plan
from planc.version import __version__

TEMPLATES = Path(__file__).parent / "templates"


def kernels(plan: Plan, config: Mapping[str, Any] | None = None) -> list[Kernel]:
    """The kernels a plan needs, in the order of their names; none where nothing was fused.

    config   the model's own configuration (a Hugging Face `config.json`); without it the manifest
             lists no sizes, and a check takes common ones.
    """
    sizes = Sizes.of(config, sorted({replica.tp for replica in plan.replicas()}))
    fp8 = any(replica.activations == "fp8" for replica in plan.replicas())
    wanted: dict[str, set[str]] = {}
    for layer in plan.layers:
        for name in called_for(frozenset(layer.decisions.fusions), _activation(config)):
            for variant in (name, f"{name}_fp8") if fp8 else (name,):
                if variant in KINDS:
                    wanted.setdefault(variant, set()).add(layer.layer_class)
    return [
        render(KINDS[name], sizes=sizes.of_kind(KINDS[name]), layer_classes=sorted(classes))
        for name, classes in sorted(wanted.items())
    ]


def called_for(fusions: frozenset[str], activation: str) -> tuple[str, ...]:
    """Kernels that a layer's fusions need. activation: as in `planc.gated_activation`."""
    needed: list[str] = []
    if "residual_add_rms_norm" in fusions:
        needed += ["add_rms_norm", "rms_norm"]  # the first layer has no residual to add
    if "gate_up_merge" in fusions:
        needed.append(f"{activation}_mul")
    if "rope_kv_write" in fusions:
        needed.append("qk_norm_rope_kv" if "qk_norm_rope" in fusions else "rope_kv")
    return tuple(needed)


_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}


def _activation(config: Mapping[str, Any] | None) -> str:
    """The gated MLP's activation, as the dialect names it; SiLU where the configuration is silent."""
    text = (config or {}).get("text_config") or config or {}
    named = str(text.get("hidden_act") or text.get("hidden_activation") or "silu")
    return _ACTIVATIONS.get(named, named)


def render(
    kind: Kind, *, sizes: tuple[Mapping[str, int], ...] = (), layer_classes: list[str] | None = None
) -> Kernel:
    """One kernel's text. The same kind always gives the same text, whatever the plan."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # the product is Python, and nothing of a request or a model goes into it
    )
    stamp = f"\nWritten by planc from {kind.template}; any change belongs there."
    source = environment.get_template(kind.template).render(kernel=kind, stamp=stamp, **kind.holes) + "\n"
    return Kernel(
        name=kind.name,
        op=kind.op,
        source=source,
        signature={**kind.signature, **dict.fromkeys(kind.constexprs, "constexpr")},
        dtypes=ACTIVATIONS,
        grid=kind.grid,
        sizes=sizes,
        min_capability=kind.min_capability,
        layer_classes=tuple(layer_classes or ()),
    )


def manifest(plan: Plan, found: list[Kernel]) -> str:
    """`kernels/manifest.json`: what lies beside it, by content."""
    document = {
        "planc_version": __version__,
        "plan": plan.fingerprint.plan,
        "triton": ">=3.6,<3.10",
        "kernels": [kernel.described() for kernel in found],
    }
    return json.dumps(document, indent=2, sort_keys=True) + "\n"
