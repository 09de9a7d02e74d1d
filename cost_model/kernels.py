"""What a kernel is to the cost model: specs, and the protocol that prices them.

Kernels come in stacks. `costs.gemm(specs)` prepares R of them once and returns a function that
prices them over N loads, all amounts [R, N] arrays; so tables are looked up and constants
gathered once per model, not once per step. `planc.cost_model.roofline.Roofline` is the
implementation that needs no measurement; a measured profile implements the same four methods,
may fall back to it kernel by kernel, and says how well founded each is in `Priced.sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from planc.cost_model.catalogue import Provenance
from planc.cost_model.collectives import Fabric
from planc.cost_model.collectives import Kind as CollectiveKind
from planc.cost_model.features import Array
from planc.cost_model.routing import ExpertLoad

Bound = npt.NDArray[np.int8]
BOUNDS = ("compute", "memory", "launch", "link")
COMPUTE, MEMORY, LAUNCH, LINK = range(4)

#: which tokens of a mixed step a kernel sees: all of them, or one part's
Part = Literal["step", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Gemm:
    """[m, k] @ [k, n] on one rank.

    weights, activations   formats of the operands
    out_bytes              per element of the result
    """

    n: float
    k: float
    weights: str
    activations: str
    out_bytes: float = 2.0


@dataclass(frozen=True, slots=True)
class GroupedGemm:
    """Routed experts on one rank.

    experts           of them on this rank; total_experts and top_k are the layer's
    elements          weights of all of this rank's experts
    flops_per_pair    of one (token, expert) pair, this rank's share of it
    hidden, inner     elements of a pair's vector that enters and leaves, and of what lies between the
                      products (this rank's share of the width)
    ranks             EP ranks that experts are spread over whole; 1 where they are divided by width
    load              how often each expert is chosen in service; None: as tables were timed
    copies            of this rank's slots, how many more there are than experts over ranks
    """

    experts: float
    total_experts: int
    top_k: int
    elements: float
    flops_per_pair: float
    hidden: float
    inner: float
    weights: str
    activations: str
    ranks: int = 1
    load: ExpertLoad | None = None
    copies: int = 0


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention, a recurrence, or a product of activations: work besides dense weights.

    kind          "products" is a matrix product whose operands are both activations
    part          "prefill" or "decode" tell which kernel an engine would take
    q_heads ...   this rank's heads; 0 where the op does not say
    span          how far it reaches, as in `planc.ir.work`
    kv_bytes      per cache element
    weight_bytes  weights read per call (projections inside the kernel, as in MLA)
    pair_flops    of one (query, key) pair over this rank's heads; 0 where the op does not say
    key_flops     of one cached key, as for keys and values expanded out of a latent
    token_flops   of one new token, as for projections absorbed into queries and results
    key_width     cache elements per key on this rank; of a recurrence, of a sequence's state
    gathered      context parallel: how many ranks' queries it attends with, each to its part of the keys
    """

    kind: Literal["attention", "recurrence", "products"]
    part: Part
    kv_bytes: float
    act_bytes: float = 2.0
    weight_bytes: float = 0.0
    q_heads: float = 0.0
    kv_heads: float = 0.0
    qk_dim: int = 0
    v_dim: int = 0
    latent: bool = False
    span: str = ""
    pair_flops: float = 0.0
    key_flops: float = 0.0
    token_flops: float = 0.0
    key_width: float = 0.0
    gathered: int = 1


@dataclass(frozen=True, slots=True)
class AttentionLoad:
    """What R attention kernels do in N steps.

    flops, kv, acts    [R, N]: operations, cache elements moved, activation elements moved
    tokens, sequences  [N]: of the part of the step that the kernels see
    context            [N]: mean tokens in a sequence's cache; the new one included in decode, those before
                       the step alone in prefill
    """

    flops: Array
    kv: Array
    acts: Array
    tokens: Array
    sequences: Array
    context: Array


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds [R, N] of one call each, and what bounds them (an index into BOUNDS)."""

    seconds: Array
    bound: Bound


L = TypeVar("L")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Priced(Generic[L, T]):
    """A prepared stack: call it to price loads. `sources` says for each of its kernels how well founded.

    Implementations that know no more than one provenance for all may return plain functions.
    """

    price: Callable[[L], T]
    sources: tuple[Provenance, ...]

    def __call__(self, load: L) -> T:
        return self.price(load)


def sources(priced: object, costs: KernelCosts, count: int) -> tuple[Provenance, ...]:
    """Provenance of each of `count` kernels that were prepared together."""
    return priced.sources if isinstance(priced, Priced) else (costs.source,) * count


class KernelCosts(Protocol):
    """Prices kernels on one GPU. No work (no tokens, no bytes) costs nothing."""

    @property
    def source(self) -> Provenance:
        """Of kernels that are prepared without a provenance of their own (see `Priced`)."""
        ...

    def gemm(self, specs: Sequence[Gemm]) -> Callable[[Array], Times]:
        """Takes m [R, N], the rows of the left operands."""
        ...

    def grouped_gemm(self, specs: Sequence[GroupedGemm]) -> Callable[[Array], Times]:
        """Takes tokens [R, N], routed in the layer over all ranks that share its experts."""
        ...

    def attention(self, specs: Sequence[Attention]) -> Callable[[AttentionLoad], Times]: ...

    def collective(self, kind: CollectiveKind, ranks: int, fabric: Fabric) -> Callable[[Array], Array]:
        """Takes bytes [N] of the full tensor, as `collectives.seconds` counts them; returns seconds [N]."""
        ...

    def elementwise(self, launches: Array) -> Callable[[Array], Times]:
        """launches [R, 1]: kernels per call, 0 for work fused into another one. Takes bytes [R, N]."""
        ...


def column(values: Sequence[float]) -> Array:
    """One number per spec as [R, 1]."""
    return np.array(values, dtype=np.float64).reshape(-1, 1)
