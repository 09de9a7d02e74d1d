"""Building a transformers model: on meta (nothing is allocated) or with random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from planc.errors import UnsupportedModel
from planc.ir.trace.hf_config import transformers_config


def build(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "meta",
    seed: int | None = None,
    name: str = "",
) -> nn.Module:
    """The transformers causal language model of `config`, in eval mode, eager attention and experts.

    On "meta" no weight is allocated. Elsewhere the weights are random: transformers' own
    initialisation, or with a `seed` the wider spread of `randomize`.
    Raises UnsupportedModel when the installed transformers cannot build it.
    """
    return from_config(transformers_config(config, name or "config"), dtype, device, seed, name or "config")


def from_config(
    config: Any,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int | None,
    name: str,
    trust_remote_code: bool = False,
) -> nn.Module:
    """As `build`, from a transformers configuration object."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device(device):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                trust_remote_code=trust_remote_code,
            ).eval()
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UnsupportedModel(
            model=name,
            reason=f"transformers cannot build it ({type(error).__name__}: {error})",
            mend="Another transformers version may; docs/models.md lists what works.",
        ) from error
    model.requires_grad_(False)
    if seed is not None and torch.device(device).type != "meta":
        randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Random weights in place whose logits spread by 2-5, so that greedy tokens vary.

    Matrices get a standard deviation of 1/sqrt(fan in) (the output head three times that), vectors
    keep their initial value plus a spread of 0.2, so that no norm is the identity. Where the head is
    tied to the embedding the final norm gets random signs: else every token would predict itself.
    """
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is model.get_input_embeddings().weight  # type: ignore[operator]
    final_norm = getattr(getattr(model.base_model, "norm", None), "weight", None) if tied else None
    with torch.no_grad():
        for tensor in _own_tensors(model):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor is getattr(head, "weight", None):
                value = noise * (3.0 / math.sqrt(tensor.shape[-1]))
            elif tensor is final_norm:
                value = noise
            elif tensor.ndim > 1:
                value = noise / math.sqrt(tensor.shape[-1])
            else:
                start = tensor.float().nan_to_num(0.0, 0.0, 0.0)
                value = torch.where(start.abs() < 10, start, 0.0) + 0.2 * noise
            tensor.copy_(value.to(tensor.dtype))


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    saved = model.state_dict(keep_vars=True)
    names = {name for name, _ in model.named_buffers()}
    for name, tensor in saved.items():
        if name in names and tensor.is_floating_point():
            yield tensor


def derived_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Real CPU values of the buffers that follow from the configuration (rotary frequencies, ...).

    They are not in any checkpoint, so a graph traced on meta carries them itself. transformers'
    own initialisation computes them; a buffer that it does not set is left out.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        held = {n: b for n, b in module._buffers.items() if b is not None}
        held = {n: b for n, b in held.items() if n in module._non_persistent_buffers_set}
        if not held:
            continue
        zeros, ones = (_initialised(model, module, held, fill) for fill in (0, 1))
        same = (n for n in held if torch.equal(zeros[n], ones[n]))  # set, whatever was there before
        found |= {f"{path}.{n}" if path else n: ones[n] for n in same}
    return found


def _initialised(
    model: nn.Module, module: nn.Module, buffers: Mapping[str, Tensor], fill: int
) -> dict[str, Tensor]:
    """What transformers' initialisation makes of a module's buffers that hold `fill`."""
    try:
        module._buffers.update({n: torch.full_like(b, fill, device="cpu") for n, b in buffers.items()})
        model._init_weights(module)  # type: ignore[operator]
        return {n: value for n in buffers if (value := module._buffers[n]) is not None}
    finally:
        module._buffers.update(buffers)
