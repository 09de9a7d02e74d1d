"""Collectives as ops: what ranks of a parallel group say to each other, visible in the graph.

Each op names its group ("tp", "pp", ...) and the number of ranks in it, so that a graph of one
rank reads, prints and is costed without any process group. Running one needs the group: bind it
with `bound_groups`. The reference implementation goes through `torch.distributed` (gloo on CPU,
NCCL on GPUs). A group that is not bound is an error even where it has one rank.

Shapes below: n ranks, and `dim` is the divided dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from planc.errors import InvalidField
from planc.ir.opdef import Call, OpDef, declare
from planc.ir.work import Work

_GROUPS: ContextVar[Mapping[str, dist.ProcessGroup] | None] = ContextVar("planc_groups", default=None)


@contextmanager
def bound_groups(groups: Mapping[str, dist.ProcessGroup]) -> Iterator[None]:
    """Binds group names to process groups while graphs with collectives run."""
    token = _GROUPS.set(dict(groups))
    try:
        yield
    finally:
        _GROUPS.reset(token)


def process_group(name: str, size: int | None = None) -> dist.ProcessGroup:
    """The process group bound to `name`; InvalidField where there is none or its size differs."""
    found = (_GROUPS.get() or {}).get(name)
    if found is None:
        raise InvalidField(
            where="collective",
            field="group",
            value=name,
            reason="no process group is bound to this name",
            mend="Run the graph inside planc.ir.ops.collectives.bound_groups({name: process_group}).",
        )
    if size is not None and dist.get_world_size(found) != size:
        raise InvalidField(
            where="collective",
            field="group",
            value=name,
            reason=f"the graph is for {size} ranks, the bound group has {dist.get_world_size(found)}",
            mend="Shard the graph for as many ranks as take part.",
        )
    return found


@torch.library.custom_op("planc::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str, ranks: int) -> Tensor:
    """The sum of every rank's x [...], on every rank [...]."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=process_group(group, ranks))
    return out


@all_reduce.register_fake
def _(x: Tensor, group: str, ranks: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("planc::all_gather", mutates_args=())
def all_gather(x: Tensor, dim: int, group: str, ranks: int) -> Tensor:
    """Every rank's x [.., d, ..] laid end to end in rank order, on every rank: [.., n d, ..]."""
    piece = x.contiguous()
    pieces = [torch.empty_like(piece) for _ in range(ranks)]
    dist.all_gather(pieces, piece, group=process_group(group, ranks))
    return torch.cat(pieces, dim)


@all_gather.register_fake
def _(x: Tensor, dim: int, group: str, ranks: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] * ranks
    return x.new_empty(shape)


@torch.library.custom_op("planc::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, dim: int, group: str, ranks: int) -> Tensor:
    """The sum of every rank's x [.., d, ..]; each rank keeps its own piece: [.., d / n, ..]."""
    members = process_group(group, ranks)
    pieces = [piece.contiguous() for piece in x.chunk(ranks, dim)]
    out = torch.empty_like(pieces[0])
    if dist.get_backend(members) == "gloo":  # gloo has no reduce_scatter of lists: sum, then keep a piece
        whole = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=members)
        return whole.chunk(ranks, dim)[dist.get_rank(members)].clone(memory_format=torch.contiguous_format)
    dist.reduce_scatter(out, pieces, group=members)
    return out


@reduce_scatter.register_fake
def _(x: Tensor, dim: int, group: str, ranks: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] // ranks
    return x.new_empty(shape)


@torch.library.custom_op("planc::all_to_all", mutates_args=())
def all_to_all(x: Tensor, split: int, concat: int, group: str, ranks: int) -> Tensor:
    """Piece i of x along `split` goes to rank i; what arrives is laid end to end along `concat`."""
    members = process_group(group, ranks)
    send_pieces = [piece.contiguous() for piece in x.chunk(ranks, split)]
    pieces = [torch.empty_like(send_pieces[0]) for _ in range(ranks)]
    dist.all_to_all_single(
        stacked := torch.empty_like(torch.stack(pieces)), torch.stack(send_pieces), group=members
    )
    return torch.cat(list(stacked.unbind(0)), concat)


@all_to_all.register_fake
def _(x: Tensor, split: int, concat: int, group: str, ranks: int) -> Tensor:
    shape = list(x.shape)
    shape[split] = shape[split] // ranks
    shape[concat] = shape[concat] * ranks
    return x.new_empty(shape)


@torch.library.custom_op("planc::send", mutates_args=())
def send(x: Tensor, to: int, group: str) -> Tensor:
    """Sends x to rank `to` of the group (a stage boundary). Gives a copy of x, so that the call
    is used and no clean-up drops it."""
    members = process_group(group)
    dist.send(x.contiguous(), dist.get_global_rank(members, to), group=members)
    return x.clone()


@send.register_fake
def _(x: Tensor, to: int, group: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("planc::recv", mutates_args=())
def recv(like: Tensor, sender: int, group: str) -> Tensor:
    """Receives a tensor of the shape and type of `like` from rank `sender` of the group."""
    members = process_group(group)
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(out, dist.get_global_rank(members, sender), group=members)
    return out


@recv.register_fake
def _(like: Tensor, sender: int, group: str) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@torch.library.custom_op("planc::vocab_embedding", mutates_args=())
def vocab_embedding(weight: Tensor, indices: Tensor, first: int) -> Tensor:
    """One rank's share of an embedding divided by rows of the vocabulary: [*indices, hidden].

    `weight` holds rows first .. first + len(weight) of the table. Indices outside give zeros, so the
    sum over the ranks is the embedding (Shoeybi et al. 2019, Megatron-LM, section 3).
    """
    local = indices - first
    held = (local >= 0) & (local < weight.shape[0])
    found = torch.nn.functional.embedding(local.clamp(0, weight.shape[0] - 1), weight)
    return found * held.unsqueeze(-1).to(found.dtype)


@vocab_embedding.register_fake
def _(weight: Tensor, indices: Tensor, first: int) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _link(call: Call) -> Work:
    """`reads` leaves this rank's memory for the link, `writes` is what it holds afterwards."""
    target = call.node.target
    assert isinstance(target, torch._ops.OpOverload)
    names = [argument.name for argument in target._schema.arguments]
    ranks = int(call.arg("ranks")) if "ranks" in names else 2
    return Work("link", reads=call.elements(names[0]), writes=call.out(), dims={"ranks": ranks})


def _vocab_embedding_work(call: Call) -> Work:
    return Work("gather", reads=call.out() + call.elements("indices"), writes=call.out())


for _name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "recv"):
    declare(OpDef(getattr(torch.ops.planc, _name).default, work=_link))

declare(
    OpDef(
        torch.ops.planc.vocab_embedding.default,
        work=_vocab_embedding_work,
    )
)

#: Ops of torch that cannot be told which piece they hold -> the op that can, and how many leading
#: arguments the two share; the first index held follows them.
TWINS = {torch.ops.aten.embedding.default: (torch.ops.planc.vocab_embedding.default, 2)}
