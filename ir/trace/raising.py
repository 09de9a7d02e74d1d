"""Raising: while a Hugging Face model is traced, its parts speak the `planc` dialect.

`raised(model)` swaps attention, experts, norms, rotary embeddings, gated MLPs, routers, indexers and
linear-attention kernels for ops of the dialect, and puts everything back when it is left. Two ways
lead there: transformers' own registries (attention, experts), and the forward of single modules.

Nothing is believed by its name. A module or function is replaced only when its own code, run on
random numbers, gives what the op gives; otherwise it stays as it is and traces to ATen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


@dataclass(slots=True)
class Raising:
    """What one tracing run has replaced, and what it must remember until the end.

    positions  position_ids [B, S] of the forward being traced
    probed     results of checks, shared by modules of one class and shape
    left       class names of modules that looked like a known part but did not compute it
    folded     layers that share a trace, see `planc.ir.trace.depth`
    """

    stack: ExitStack
    positions: Tensor | None = None
    probed: dict[Any, Any] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    folded: Any = None

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute until the raising ends."""
        own = vars(owner)
        before = own.get(name, _ABSENT)

        def restore() -> None:
            if before is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = before

        own[name] = value
        self.stack.callback(restore)

    def probe(self, key: Any, check: Callable[[], Any]) -> Any:
        """The result of a check, run once per key."""
        if key not in self.probed:
            self.probed[key] = check()
        return self.probed[key]


@contextmanager
def raised(model: nn.Module) -> Iterator[Raising]:
    """The model with its parts raised; its forward takes (input_ids, position_ids) and gives logits.

    Registries and modeling functions of transformers are patched for the duration, so two models
    must not be traced at the same time in one process.
    """
    from planc.ir.trace.depth import fold_depth
    from planc.ir.trace.raise_attention import raise_attention
    from planc.ir.trace.raise_experts import raise_experts
    from planc.ir.trace.raise_linear import raise_linear_attention
    from planc.ir.trace.raise_modules import raise_modules
    from planc.ir.trace.raise_rotary import raise_rotary

    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        raising = Raising(stack)
        raising.folded = fold_depth(raising, model)
        for step in (raise_attention, raise_experts, raise_modules, raise_rotary, raise_linear_attention):
            step(raising, model)
        raising.set(model, "forward", text_forward(raising, model))
        yield raising


def text_forward(raising: Raising, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """(input_ids [B, S], position_ids [B, S]) -> logits [B, S, V], nothing cached."""
    forward = model.forward

    def text(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        assert input_ids.shape == position_ids.shape  # one batch and one sequence symbol from the start
        raising.positions = position_ids
        # a mask of four dimensions is passed through by transformers; every raised op masks by itself
        nothing = input_ids.new_ones((1, 1, 1, 1))
        logits = forward(
            input_ids=input_ids, position_ids=position_ids, attention_mask=nothing, use_cache=False
        ).logits
        assert isinstance(logits, Tensor)
        return logits

    return text


def modeling_files(model: nn.Module) -> list[Any]:
    """The Python modules that the model's classes come from (its own and those it borrows from)."""
    names = dict.fromkeys(type(part).__module__ for part in model.modules())
    return [sys.modules[name] for name in names if not name.startswith("torch.")]


def equal(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether two small results agree; shapes and types must, too."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def attempt(run: Callable[[], Any]) -> Any:
    """What a probed piece of model code gives, or None where it does not take the probe's arguments."""
    try:
        with torch.no_grad(), torch.device("cpu"):
            return run()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError):
        return None


def stand_in(module: nn.Module, **replaced: Any) -> Any:
    """A shallow copy of a module with some parameters, buffers, children or attributes replaced.

    The copy computes with the class's own forward, on tensors small enough to probe with.
    """
    twin = object.__new__(type(module))
    state = dict(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        state[table] = dict(state[table])
    state.pop("forward", None)
    for name, value in replaced.items():
        for table in ("_parameters", "_buffers", "_modules"):
            if name in state[table]:
                state[table][name] = value
                break
        else:
            state[name] = value
    twin.__dict__.update(state)
    return twin
