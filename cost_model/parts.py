"""Parts of a model that take number formats of their own.

A part is what engines can be told apart from the rest: the matrices of one module in the layers of a class
("decoder:self_attn", "moe:mlp.experts"), in some of these layers only ("decoder[0-7,72-79]:mlp"), or the
cache that the layers of a class keep ("sliding:kv"). Matrices of one module share a format because engines
merge them (queries, keys and values; gate and up projections).

A scheme is what a part takes: "weights/activations", or one format for a cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

from planc.cost_model.table import CostTable, LayerClass
from planc.ir.work import Family

#: what stands in a module's place where the cache is meant
KV = "kv"

#: (part, scheme) pairs, as shapes, replicas and graphs carry them
Exceptions = tuple[tuple[str, str], ...]

_PRODUCTS: tuple[Family, ...] = ("gemm", "grouped_gemm")

_PART = re.compile(r"(?P<cls>[^\[\]:]+)(\[(?P<layers>\d+(-\d+)?(,\d+(-\d+)?)*)\])?:(?P<module>[^:]*)")


@dataclass(frozen=True, slots=True)
class Part:
    """`module` of the layers of a class; of all of them where `layers` is empty.

    module   path of the module that holds the matrices, inside the layer; "" the layer itself; "kv" the cache
    """

    layer_class: str
    module: str
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{banded(self.layer_class, self.layers)}:{self.module}"


@dataclass(frozen=True, slots=True)
class Held(Part):
    """A part of a table with what it holds.

    count      layers that it lies in
    elements   weight elements, or cache elements per token, of one layer
    active     of these what one token meets: of routed experts its top_k
    family     of the products that read the matrices; "attention" of a cache
    """

    count: int = 0
    elements: int = 0
    active: float = 0.0
    family: Family = "gemm"

    @property
    def cached(self) -> bool:
        return self.module == KV

    @property
    def whole(self) -> int:
        """Elements of all its layers."""
        return self.count * self.elements

    @property
    def part(self) -> Part:
        return Part(self.layer_class, self.module, self.layers)


@cache
def parse(text: str) -> Part | None:
    """A part from its text; None where it is none."""
    found = _PART.fullmatch(text)
    if found is None:
        return None
    return Part(found["cls"], found["module"], numbers(found["layers"] or ""))


def banded(layer_class: str, layers: Sequence[int]) -> str:
    """ "decoder[0-3,7]"; the class's own name for no layers in particular."""
    return f"{layer_class}[{ranges(layers)}]" if layers else layer_class


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 7 -> "0-2,7"."""
    runs = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        mine = [number for _, number in run]
        runs.append(str(mine[0]) if len(mine) == 1 else f"{mine[0]}-{mine[-1]}")
    return ",".join(runs)


def numbers(text: str) -> tuple[int, ...]:
    """ "0-2,7" -> 0, 1, 2, 7; the inverse of `ranges`."""
    found: set[int] = set()
    for piece in text.split(","):
        if piece:
            first, _, last = piece.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def scheme(text: str) -> tuple[str, str]:
    """(weights, activations) of a scheme; one format alone stands for both."""
    weights, _, activations = text.partition("/")
    return weights, activations or weights


def module_of(site: str, family: Family) -> str:
    """The module whose matrices share a format with those of a row at this site: routed experts are one, a
    projection belongs to the module around it."""
    return site if family == "grouped_gemm" else site.rpartition(".")[0]


def module_of_weight(name: str) -> str:
    """The same from a parameter's or checkpoint tensor's name inside its layer: "mlp.experts.3.w1.weight" ->
    "mlp.experts"."""
    parts = name.split(".")
    if parts[-1] in ("weight", "bias"):
        parts.pop()
    parts = parts[:-1]
    while parts and parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def held(table: CostTable) -> tuple[Held, ...]:
    """All parts of a table, over all layers of each class, in the table's order. Caches of classes that
    differ in nothing but their names count apart, too: engines can tell layers apart."""
    classes = {cls.name: cls for cls in table.classes}
    found: dict[tuple[str, str, Family], dict[str, tuple[int, float]]] = {}
    for rows in table.rows.values():
        for row in rows:
            family = row.work.family
            if "weight" in row.quantizable and family in _PRODUCTS and row.layer_class in classes:
                sizes = found.setdefault((row.layer_class, module_of(row.site, family), family), {})
                whole, dims = row.work.weights * row.calls, row.work.dims
                met = dims["top_k"] / dims["experts"] if family == "grouped_gemm" else 1.0
                sizes[row.site] = whole, whole * met
    out = [
        Held(
            layer_class=name,
            module=module,
            count=classes[name].count,
            elements=sum(whole for whole, _ in sizes.values()),
            active=sum(met for _, met in sizes.values()),
            family=family,
        )
        for (name, module, family), sizes in found.items()
    ]
    order = list(classes)
    out.sort(key=lambda one: order.index(one.layer_class))
    caches = [Held(c.name, KV, (), c.count, c.kv_elements, c.kv_elements, "attention") for c in table.classes]
    return (*out, *(one for one in caches if one.elements))


def split(table: CostTable, exceptions: Exceptions) -> CostTable:
    """The table with a class of its own for every band of layers that the exceptions tell apart.

    before   decoder x 80                       exceptions decoder[0-7]:mlp
    after    decoder x 72, decoder[0-7] x 8
    """
    bands = _bands(table, exceptions)
    if not bands:
        return table

    def names(layer_class: str) -> Iterator[str]:
        for layers in bands.get(layer_class, ((),)):
            yield banded(layer_class, layers)

    return replace(
        table,
        classes=tuple(part for cls in table.classes for part in _cut(cls, bands.get(cls.name, ((),)))),
        rows={
            phase: tuple(
                row if name == row.layer_class else replace(row, layer_class=name)
                for layer_class, mine in groupby(rows, key=lambda row: row.layer_class)
                for kept in (list(mine),)
                for name in names(layer_class)
                for row in kept
            )
            for phase, rows in table.rows.items()
        },
        fusions=tuple(
            replace(offer, layer_class=name) for offer in table.fusions for name in names(offer.layer_class)
        ),
    )


def _bands(table: CostTable, exceptions: Exceptions) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """Class -> its bands; () among them is the rest of the layers, under the class's own name."""
    named: dict[str, list[frozenset[int]]] = {}
    for text, _ in exceptions:
        part = parse(text)
        if part is not None and part.layers:
            named.setdefault(part.layer_class, []).append(frozenset(part.layers))
    found = {}
    for cls in table.classes:
        if cls.name in named:
            kinds: dict[tuple[bool, ...], list[int]] = {}
            for layer in cls.layers:
                kinds.setdefault(tuple(layer in each for each in named[cls.name]), []).append(layer)
            rest = kinds.pop((False,) * len(named[cls.name]), None)
            bands = [tuple(layers) for layers in kinds.values()]
            found[cls.name] = (*([()] if rest else []), *bands)
    return found


def _cut(cls: LayerClass, bands: tuple[tuple[int, ...], ...]) -> Iterator[LayerClass]:
    taken = {layer for band in bands for layer in band}
    for band in bands:
        layers = band or tuple(layer for layer in cls.layers if layer not in taken)
        if band or taken:
            yield replace(cls, name=banded(cls.name, band), count=len(layers), layers=layers)
        else:
            yield cls


def taken(exceptions: Exceptions, layer_class: str, module: str) -> str | None:
    """The scheme of a module in a class (or band) of `split`'s; None where it is no exception. What names
    layers wins over what names the whole class."""
    band = parse(f"{layer_class}:{module}")
    if band is None:
        return None
    found = None
    for layers, given in _of(exceptions).get((band.layer_class, module), ()):
        if not layers or (band.layers and layers.issuperset(band.layers)):
            found = given
    return found


@cache
def _of(exceptions: Exceptions) -> Mapping[tuple[str, str], list[tuple[frozenset[int], str]]]:
    """(class, module) -> (layers, scheme), those that name no layers first."""
    found: dict[tuple[str, str], list[tuple[frozenset[int], str]]] = {}
    for text, given in exceptions:
        part = parse(text)
        if part is not None:
            found.setdefault((part.layer_class, part.module), []).append((frozenset(part.layers), given))
    for listed in found.values():
        listed.sort(key=lambda one: bool(one[0]))
    return found
