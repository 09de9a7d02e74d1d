"""What the catalogue knows: GPUs and engines, read from `cost_model/data`.

Every entry says where its numbers come from and when they were read. Names that are not there
raise `UnknownName` with the nearest ones.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, Field

from planc.cost_model import overlay, slices
from planc.errors import InvalidField, UnknownName

Provenance = Literal["measured", "fitted", "roofline", "assumed"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4"]

GIB = 1024.0**3


class Entry(BaseModel):
    """Base of all catalogue entries: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Gpu(Entry):
    """One accelerator. Rates are vendor peaks, dense (no structured sparsity).

    memory_gib          what a program sees as total device memory, GiB (not the label on the box)
    nvlink_domain       GPUs joined by NVLink/xGMI; 1 means PCIe only
    nvlink_gbytes_s     one direction, per GPU
    pcie_bridges        of a host without NVLink: GB/s that each GPU has, one direction, in a group of up to
                        so many neighbours that all send at once; {} where nothing is known to be shared
    fabric_gbit_s       typical network per GPU, one direction
    host_slowdown       how many times as long its host's cores take for an engine's Python and launches as
                        those of the x86 servers whose measurements engines' host times come from
    slice_of            the GPU that this is a MIG slice of; "" for a whole one
    """

    name: str
    label: str
    vendor: Literal["nvidia", "amd", "cpu"]
    arch: str
    peak_tflops: Mapping[Precision, float]
    memory_gib: float = Field(gt=0)
    memory_gbytes_s: float = Field(gt=0)
    l2_mib: float = Field(gt=0)
    sm_count: int = Field(gt=0)
    clock_mhz: float = Field(gt=0)
    nvlink_domain: int = Field(ge=1)
    nvlink_gbytes_s: float = Field(ge=0)
    pcie_gbytes_s: float = Field(gt=0)
    pcie_bridges: Mapping[int, float] = Field(default_factory=dict)
    fabric_gbit_s: float = Field(gt=0)
    host_slowdown: float = Field(default=1.0, gt=0)
    tdp_w: float = Field(gt=0)
    idle_w: float = Field(ge=0)
    usd_per_hour: float = Field(ge=0)
    price_source: str
    source: str
    date: str
    aliases: tuple[str, ...] = ()
    slice_of: str = ""

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB

    @property
    def memory_bytes_s(self) -> float:
        return self.memory_gbytes_s * 1e9

    def pcie_group_gbytes_s(self, ranks: int) -> float:
        """Of each of `ranks` neighbours over PCIe while all of them send, one direction."""
        wider = [bound for bound in sorted(self.pcie_bridges) if bound >= ranks] or sorted(self.pcie_bridges)[
            -1:
        ]
        return min([self.pcie_gbytes_s, *(self.pcie_bridges[bound] for bound in wider[:1])])

    def peak_flops(self, precision: Precision) -> float:
        """FLOP/s of a product in `precision`; a format without its own units runs on bf16 (or fp32) ones."""
        found = self.peak_tflops.get(precision)
        if found is None:
            found = self.peak_tflops.get("bf16", self.peak_tflops.get("fp32", 0.0))
        return found * 1e12


class Support(Entry):
    """What an engine runs on one architecture: [weights, activations] pairs, KV formats, and the cache's
    block size where it is not the engine's usual one.

    mixed_decode   kernels that take prompts and decoding sequences together read the keys once per query
                   head instead of once per group: decode attention of a step with prompts takes this times
                   the group's heads longer, where that is more than once. 0: kernels of their own
    """

    linear: tuple[tuple[str, str], ...]
    kv: tuple[str, ...]
    block_size: int | None = None
    mixed_decode: float = Field(default=0.0, ge=0)


class GraphRule(Entry):
    """Which decode batch sizes get a CUDA graph: 1, 2, 4, then in steps up to `largest`.

    mib_fixed, mib_per_size   memory of all captures: a pool, and each size's share (assumed)
    piecewise                 rows up to which steps with prompts replay graphs between their attentions
    listed                    sizes that a deployment states, in place of the steps
    """

    small: tuple[int, ...]
    step: int
    coarse_from: int
    coarse_step: int
    largest: int
    mib_fixed: float
    mib_per_size: float
    piecewise: int = 0
    listed: tuple[int, ...] = ()

    def sizes(self, max_num_seqs: int) -> tuple[int, ...]:
        """Captured sizes for an engine with this batch cap, ascending; () when graphs are off."""
        top = min(self.largest, max_num_seqs)
        grid = set(self.small)
        grid |= set(range(self.step, min(self.coarse_from, self.largest + 1), self.step))
        grid |= set(range(self.coarse_from, self.largest + 1, self.coarse_step))
        grid = set(self.listed) or grid
        kept = {size for size in grid if size <= top}
        if max_num_seqs <= self.largest:
            kept.add(top)
        return tuple(sorted(kept))


class Serving(Entry):
    """How an engine's scheduler admits and evicts, and how it speaks to clients, by default.

    chunked_prefill    prompts are cut at the token budget; otherwise they are computed whole
    prompts_per_step   prompts that may begin in one step; None: as many as fit
    reserved_output    share of the output asked for that must be free at admission, where the engine does
                       not reserve all of it; it falls to `reserved_floor` over `reserved_steps` steps
    preemption         what becomes of the cache of a sequence that must give way
    stream_interval    tokens per message to a client
    recv_interval      steps between looks at new requests
    stream_us          a frontend's time for one message to a client, one after another
    first_token        of a request whose prompt another engine computed: the client has it from that engine
                       ("prefill"), when decoding begins ("decode"), or after one more step that computes
                       it again ("again")
    keeps_seat         a prompt that another engine decodes keeps its seat until its cache has been fetched
    handover_pp        roles whose engines may have pipeline stages where prompts and decoding are apart;
                       None: the engine does not keep them apart
    request_ms         a request's way to the scheduler: network, tokenizer, admission; None as in the
                       planner's priors
    """

    chunked_prefill: bool
    prompts_per_step: int | None = None
    reserved_output: float = Field(default=0.0, ge=0, le=1)
    reserved_floor: float | None = Field(default=None, ge=0, le=1)
    reserved_steps: int = Field(default=600, ge=1)
    preemption: Literal["recompute", "swap"] = "recompute"
    stream_interval: int = Field(default=1, ge=1)
    recv_interval: int = Field(default=1, ge=1)
    stream_us: float = Field(default=0.0, ge=0)
    first_token: Literal["prefill", "decode", "again"] = "prefill"
    keeps_seat: bool = False
    handover_pp: tuple[Literal["prefill", "decode"], ...] | None = None
    request_ms: float | None = Field(default=None, ge=0)
    source: str
    date: str


class ContextParallel(Entry):
    """Where an engine spreads the tokens of a cache over `cp` of its tp ranks, which else would hold copies.

    caches     "heads": keys and values, over the ranks that hold copies of the same heads; "latent": one
               compressed cache, of which every tp rank holds a copy
    roles      pools whose engines may
    handover   caches that may be handed over so spread, between prefill and decode pools
    whole      handed over only if spread over all tp ranks
    """

    caches: tuple[Literal["heads", "latent"], ...]
    roles: tuple[Literal["aggregated", "prefill", "decode"], ...]
    handover: tuple[Literal["heads", "latent"], ...] = ()
    whole: bool = False
    source: str
    date: str


class EngineProfile(Entry):
    """What an engine can load and run, its defaults, and what its steps cost besides kernels.

    utilization_of       what gpu_memory_utilization is a share of: all memory for everything, all memory for
                         weights and cache only ("static"), what is free after all but the cache ("free")
    step_us              host time per step that no kernel hides, with CUDA graphs
    step_eager_us        the same for an engine that runs eagerly
    launch_us            host time per kernel in a compiled step without a graph (prompts, large batches);
                         kernels hide it while they take longer
    launch_eager_us      the same for an engine that runs eagerly, Python of the modules included
    launches             kernels that its host launches for what is priced as one: "collective" (not counted
                         unless stated), "latent" (prompts' attention over a latent cache), "experts" and, of
                         a format, "experts mxfp4"
    layer_us             per layer and step, of either sign: what a sum of kernels measured alone gets
                         wrong (overlap of neighbours, gaps between them)
    kernel_factor        on the time of all kernels: what one deployment's clocks and versions make of it
    per_sequence_us      host time per running sequence and step that no kernel hides (bookkeeping, the way of
                         its token to a client)
    hidden_sequence_us   more of it, beside kernels, where the host overlaps them: with the launches it is the
                         least that a step takes
    overlaps_host        the next step is decided and launched while one runs; see `StepModel.asynchronous`
    serves               kinds of model it runs
    ep_degrees           how the expert-parallel degree follows from the others ("tp_dp": 1 or tp*dp; "free":
                         whatever divides tp*dp, the ranks of a group dividing each expert's width)
    context_parallel     None: every rank keeps all tokens of its heads
    fusions              patterns of fusion names that the engine's own kernels always apply
    overlaps_shared_experts  experts that every token passes run on a stream beside the routed ones
    quantized_gather     formats in which experts' inputs are gathered from attention's dp ranks; others are
                         gathered in the wide format
    fuses_pointwise      plain pointwise ops (casts, residual sums) ride in neighbouring kernels
    custom_all_reduce    its own kernel for messages up to `custom_all_reduce_max_mib`: see `collectives.Own`
    fused_all_reduce     architectures on which the norm after an all-reduce rides in it
    experts_route        architectures on which routed experts, as timed, choose the experts too
    expert_table         name of the measured table that prices routed experts ("engine/format" or
                         "engine/format/library"), where an engine was told to run other kernels than its
                         usual ones; None: the engine's own
    fp8_gemm_backend     kernels of fp8 products with a scale per block that an engine was told to run
                         ("flashinfer_trtllm": see `block_products`); None: its usual ones
    fused_activation_quant  formats whose quantization rides in the pointwise kernel before a product; after
                         attention, or for another format, it is a kernel of its own
    """

    name: str
    version: str
    block_size: int
    block_sizes: tuple[int, ...]
    gpu_memory_utilization: float
    utilization_of: Literal["all", "static", "free"] = "all"
    max_num_seqs: int
    max_num_batched_tokens: int
    scheduling: Literal["mixed", "prefill_first"]
    serving: Serving
    serves: tuple[Literal["causal_lm", "encoder", "module"], ...] = ("causal_lm",)
    reserves_output: bool
    parallel: tuple[Literal["tp", "pp", "dp", "ep", "cp"], ...]
    ep_degrees: Literal["tp_dp", "free"]
    context_parallel: ContextParallel | None = None
    cuda_graphs: GraphRule
    framework_gib: float
    communicator_gib: float
    activation_factor: float
    step_us: float
    step_eager_us: float
    launch_us: float
    launch_eager_us: float
    launches: Mapping[str, int] = Field(default_factory=dict)
    layer_us: float = 0.0
    kernel_factor: float = 1.0
    per_sequence_us: float
    hidden_sequence_us: float = 0.0
    overlaps_host: bool
    prefill_factor: float
    custom_all_reduce_max_mib: float
    custom_all_reduce: Literal["barrier", "lamport"] = "barrier"
    fusions: tuple[str, ...]
    fuses_pointwise: bool
    overlaps_shared_experts: bool = False
    expert_table: str | None = None
    fp8_gemm_backend: Literal["flashinfer_trtllm"] | None = None
    quantized_gather: tuple[str, ...] = ()
    fused_all_reduce: tuple[str, ...] = ()
    experts_route: tuple[str, ...] = ()
    fused_activation_quant: tuple[str, ...]
    archs: Mapping[str, Support]
    source: str
    date: str

    def support(self, gpu: Gpu) -> Support | None:
        """What runs on this GPU; None when the engine has no backend for it."""
        return self.archs.get(gpu.arch)

    def offline(self, pp: int) -> EngineProfile:
        """The engine without clients: answers leave whole, no token takes time on its way out of a step, and
        kernels hide all of a sequence's host time. With pipeline stages they hide none."""
        return self.model_copy(update={"per_sequence_us": 0.0}) if pp == 1 else self

    def block_size_on(self, gpu: Gpu) -> int:
        """Tokens in one block of the cache on this GPU."""
        found = self.support(gpu)
        return (found.block_size if found else None) or self.block_size

    def pairs(self, gpu: Gpu) -> tuple[tuple[str, str], ...]:
        """(weights, activations) format pairs that run on this GPU."""
        found = self.support(gpu)
        return found.linear if found else ()

    def kv_formats(self, gpu: Gpu) -> tuple[str, ...]:
        found = self.support(gpu)
        return found.kv if found else ()


def read(name: str) -> Any:
    """A YAML document under `cost_model/data`."""
    text = resources.files("planc.cost_model.data").joinpath(name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


def gpus() -> Mapping[str, Gpu]:
    """All GPUs by name, in the file's order; with the numbers of the measured profile in use, if any."""
    found = overlay.current()
    return _shipped_gpus() if found is None else found.gpus


def engines() -> Mapping[str, EngineProfile]:
    """All engine profiles by name; with the numbers of the measured profile in use, if any."""
    found = overlay.current()
    return _shipped_engines() if found is None else found.engines


@cache
def _shipped_gpus() -> Mapping[str, Gpu]:
    return {name: Gpu(name=name, **entry) for name, entry in read("gpus.yaml")["gpus"].items()}


@cache
def _shipped_engines() -> Mapping[str, EngineProfile]:
    folder = resources.files("planc.cost_model.data").joinpath("engines")
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    found = [EngineProfile(**read(f"engines/{name}")) for name in names]
    return {profile.name: profile for profile in found}


def gpu(name: str, field: str = "gpu") -> Gpu:
    """A GPU by name or alias, however spelled ("NVIDIA H100 80GB HBM3"), or a MIG slice of one
    ("h100_sxm:3g.40gb"). Raises UnknownName."""
    known = gpus()
    whole, colon, profile = name.partition(":")
    if colon:
        parent = gpu(whole, field)
        offered = slices.profiles(parent.name)
        if not offered:
            raise InvalidField(
                where="catalogue",
                field=field,
                value=name,
                reason=f"no MIG slices of {parent.name} are known",
                mend=f"Use {parent.name} itself.",
            )
        if profile not in offered:
            return unknown(field, name, "MIG slice", [f"{parent.name}:{one}" for one in offered])
        return slices.part_of(parent, profile)
    if name in known:
        return known[name]
    named = {alias: entry for entry in known.values() for alias in entry.aliases} | dict(known)
    for spelling in (name, *_spellings(name)):
        if spelling in named:
            return named[spelling]
    return unknown(field, name, "GPU", [*known, *(a for e in known.values() for a in e.aliases)])


#: words of a GPU's full name that the catalogue's leave out
_EXTRA = re.compile(
    r"nvidia|amd|geforce|instinct|tensor|core|gpu|blackwell|server|workstation|edition|hbm\de?|\d+g(i?b)?"
)


def _spellings(name: str) -> tuple[str, str]:
    """A full name in the catalogue's manner, with and without the size of its memory."""
    words = [re.sub(r"^sxm\d$", "sxm", word) for word in re.split(r"[^a-z0-9]+", name.lower())]
    sized = [word for word in words if word and (word[0].isdigit() or not _EXTRA.fullmatch(word))]
    return "_".join(sized), "_".join(word for word in sized if not _EXTRA.fullmatch(word))


def engine(name: str, field: str = "engine") -> EngineProfile:
    """An engine profile by name. Raises UnknownName."""
    known = engines()
    if name in known:
        return known[name]
    return unknown(field, name, "engine", known)


def unknown(field: str, value: str, kind: str, known: Iterable[str]) -> NoReturn:
    """Raises UnknownName with the nearest known names (all of them when none is near)."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    mend = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(names)}."
    raise UnknownName(field=field, value=value, kind=kind, mend=mend)
