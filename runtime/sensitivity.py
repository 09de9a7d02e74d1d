"""How much each part of a model suffers from each scheme alone, measured on given weights and tokens.

The traced graph runs once as it is, and once for every part and scheme with that part quantized and all else
untouched. Every run is of the same graphs and formats that a plan would execute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from planc.cost_model.formats import fmt
from planc.cost_model.parts import Held, Part, held, scheme
from planc.cost_model.sensitivities import Measured, Sensitivities
from planc.errors import InvalidField
from planc.ir.graph import Graph
from planc.passes.pipeline import FRONT, run
from planc.passes.quantize import Quantize
from planc.passes.tabulate import tabulate
from planc.runtime.binding import bind

#: schemes measured when none are named
SCHEMES = ("fp8/fp8", "int8/int8", "w4a16/bf16")


def sensitivities(
    traced: Graph,
    weights: Mapping[str, Tensor],
    tokens: Sequence[Sequence[int]],
    *,
    schemes: Sequence[str] = SCHEMES,
    bands: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Sensitivities:
    """Divergence and relative error of the logits with one part in one scheme, for all parts and schemes.

    traced    a language model's traced graph; weights are its source model's, by name
    tokens    calibration prompts, token ids; a sequence is run by itself
    schemes   "weights/activations" each
    bands     pieces of consecutive layers that every class is measured in, at most as many as it has layers

    Takes parts * bands * schemes runs over all tokens, and all weights in memory. Caches are not measured.
    Raises InvalidField for a model without logits or without tokens, UnknownName for a scheme.
    """
    if traced.source.kind != "causal_lm":
        raise InvalidField(
            where="sensitivities",
            field="model",
            value=traced.source.name,
            reason="only language models give the logits that are compared",
            mend="Name a causal language model.",
        )
    prompts = [torch.tensor([list(prompt)]) for prompt in tokens if len(prompt)]
    if not prompts:
        raise InvalidField(
            where="sensitivities",
            field="tokens",
            value=list(tokens),
            reason="there are none to run",
            mend="Give token ids of a few hundred words that the model is used for.",
        )
    front = run(traced, FRONT)
    table = tabulate(traced)
    exact = _logits(front, weights, prompts)
    layers = {cls.name: cls.layers for cls in table.classes}
    found = []
    for part in (one for one in held(table) if not one.cached):
        for band in _bands(layers[part.layer_class], bands):
            for name in (s for s in schemes if _takes(part, s)):
                where = str(Part(part.layer_class, part.module, band))
                if progress:
                    progress(f"{where} in {name}")
                rounded = _logits(Quantize({where: name}).apply(front), weights, prompts)
                kl, error = _differences(exact, rounded)
                found.append(Measured(part=where, scheme=name, kl=kl, error=error))
    return Sensitivities(
        model=traced.source.name, tokens=sum(prompt.shape[1] for prompt in prompts), parts=tuple(found)
    )


def _takes(part: Held, name: str) -> bool:
    """Raises UnknownName."""
    return part.family in fmt(scheme(name)[0], field="schemes").families


def _bands(layers: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Layers in `count` runs of near-equal length; [()] for all of them together."""
    count = min(count, len(layers))
    if count <= 1:
        return [()]
    edges = [round(i * len(layers) / count) for i in range(count + 1)]
    return [tuple(layers[a:b]) for a, b in pairwise(edges)]


@torch.inference_mode()
def _logits(graph: Graph, weights: Mapping[str, Tensor], prompts: Sequence[Tensor]) -> Tensor:
    """[tokens, V] of all prompts after each other, in fp32."""
    (module,) = bind((graph,), weights)
    found = [module(ids, torch.arange(ids.shape[1])[None]) for ids in prompts]
    return torch.cat([logits[0].float() for logits in found])


def _differences(exact: Tensor, rounded: Tensor) -> tuple[float, float]:
    """Mean divergence of the next token's distribution, nats, and relative error of the logits."""
    kl = kl_div(log_softmax(rounded, -1), log_softmax(exact, -1), reduction="batchmean", log_target=True)
    return max(float(kl), 0.0), float((rounded - exact).norm() / exact.norm())
