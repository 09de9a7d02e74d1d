"""Which attention kernel an engine runs on an architecture, and the constants that are the kernel's own.

Where no kernel is known (another vendor's GPU, a processor), every constant is the general one of
`data/efficiencies.yaml`. A number that was measured on the very GPU comes before either.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from planc.cost_model.catalogue import Entry, Gpu, read
from planc.cost_model.efficiency import Efficiencies
from planc.cost_model.softmax import Constants


class Kernel(Entry):
    """What is its own: some fields of `softmax.Constants`."""

    note: str
    constants: Mapping[str, float]


class Choice(Entry):
    """A kernel, and where it runs; what is left empty does not matter.

    head_dims         of queries and keys; kernels of latent attention match no list
    narrow_cache      caches of 8 bits alone, or of 16 alone
    narrow_products   prefill multiplies in the format of an 8-bit cache, where others widen it
    """

    kernel: str
    archs: tuple[str, ...]
    engines: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    narrow_cache: bool | None = None
    narrow_products: bool = False

    def serves(self, arch: str, engine: str, head_dim: int, narrow: bool) -> bool:
        return (
            arch in self.archs
            and (not self.engines or engine in self.engines)
            and (not self.head_dims or head_dim in self.head_dims)
            and self.narrow_cache in (None, narrow)
        )


class AttentionKernels(Entry):
    """The whole of `data/attention.yaml`; of choices that serve, the first counts."""

    date: str
    source: str
    kernels: Mapping[str, Kernel]
    choices: tuple[Choice, ...]

    def choice(self, arch: str, engine: str, head_dim: int, narrow: bool) -> Choice | None:
        return next((one for one in self.choices if one.serves(arch, engine, head_dim, narrow)), None)


@cache
def kernels() -> AttentionKernels:
    return AttentionKernels(**read("attention.yaml"))


def constants(known: AttentionKernels, choice: Choice | None, gpu: Gpu, named: Efficiencies) -> Constants:
    """Of the kernel chosen, on this GPU."""
    own = {} if choice is None else known.kernels[choice.kernel].constants
    found = {}
    for name in Constants.names():
        entry = named.values[f"attention_{name}"]
        measured = entry.by_gpu.get(gpu.name, {})
        found[name] = measured.get("any", measured.get("bf16", own.get(name, entry.value)))
    return Constants(**found)
