"""Fusions of a table in force: groups of kernels become one kernel each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.kernels import Gemm
from planc.cost_model.rank_ops import Kernel, per_token, terms
from planc.cost_model.table import CostTable, FusionOffer
from planc.ir.work import total


def chosen(
    table: CostTable, profile: EngineProfile, fusions: frozenset[str] | None
) -> tuple[FusionOffer, ...]:
    """The offers that are in force."""
    if fusions is not None:
        return tuple(offer for offer in table.fusions if offer.name in fusions)
    return tuple(offer for offer in table.fusions if any(fnmatchcase(offer.name, p) for p in profile.fusions))


def fused(mine: list[Kernel], offers: Sequence[FusionOffer]) -> list[Kernel]:
    """Kernels of one class with the offers applied: groups of sites become one kernel each."""
    group: dict[str, int] = {}
    saved: dict[int, list[FusionOffer]] = {}
    sites = {site for kernel in mine for site in kernel.sites}
    for number, offer in enumerate(offers):
        wanted = [site for site in offer.sites if site in sites]
        if len(wanted) < len(offer.sites):
            continue
        joined = {group[site] for site in wanted if site in group}
        saved[number] = [offer, *(o for old in joined for o in saved.pop(old))]
        for site, old in list(group.items()):
            if old in joined:
                group[site] = number
        group.update(dict.fromkeys(wanted, number))
    out = [kernel for kernel in mine if kernel.sites[0] not in group]
    for number, applied in saved.items():
        out.extend(_one_group([k for k in mine if group.get(k.sites[0]) == number], applied))
    return out


def _one_group(members: list[Kernel], applied: Sequence[FusionOffer]) -> list[Kernel]:
    """GEMMs of equal inner width become one; pointwise kernels share launches and lose saved traffic."""
    gemms = [k for k in members if isinstance(k.spec, Gemm)]
    points = [k for k in members if k.spec is None]
    others = [k for k in members if k.spec is not None and not isinstance(k.spec, Gemm)]
    launches = float(sum(offer.launches for offer in applied))
    gone = sum(per_token(offer.reads + offer.writes) for offer in applied)
    out = list(others)
    if len(gemms) > 1 and len({_left(k) for k in gemms}) == 1:
        launches -= sum(k.calls for k in gemms) - gemms[0].calls
        gone -= sum(per_token(k.reads) * k.calls for k in gemms[1:])  # the shared input is read once
        gemms = [_merged(gemms)]
    out.extend(gemms)
    if points:
        # a sum that rides in its neighbour has no launch to save, so only what is left of the offer counts
        each = sum(k.calls for k in points)
        ride = sum(k.calls * k.launches for k in points)
        floor = 0.0 if gemms or others else 1.0
        share = max(min(ride, each - max(launches, 0.0)), floor) / ride if ride else 0.0
        moved = sum(k.traffic * k.calls for k in points)
        kept = min(max(1.0 - gone / moved, 0.0), 1.0) if moved else 1.0
        out.extend(replace(k, launches=k.launches * share, nbytes=k.nbytes * kept) for k in points)
    return out


def _left(kernel: Kernel) -> object:
    """What products must share to be merged along their outputs."""
    assert isinstance(kernel.spec, Gemm)
    return kernel.part, terms(kernel.rows), kernel.spec.k, kernel.spec.weights, kernel.spec.activations


def _merged(gemms: list[Kernel]) -> Kernel:
    first = gemms[0]
    assert isinstance(first.spec, Gemm)
    width = sum(k.calls * k.spec.n for k in gemms if isinstance(k.spec, Gemm)) / first.calls
    return replace(
        first,
        sites=tuple(site for k in gemms for site in k.sites),
        spec=replace(first.spec, n=width),
        flops=total(k.flops * (k.calls / first.calls) for k in gemms),
        writes=total(k.writes * (k.calls / first.calls) for k in gemms),
    )
