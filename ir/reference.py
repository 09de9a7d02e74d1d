"""The reference of the dialect in docs/ir.md, written from the declarations themselves.

    python -m planc.ir.reference docs/ir.md      rewrites the part between the markers

A test holds the page to what this writes, so it is always current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch

import planc.ir.ops  # noqa: F401  (registers the dialect)
from planc.ir.opdef import OpDef, ShardRule, declarations
from planc.ir.verify import RERUN, RULES

BEGIN = "<!-- written by planc.ir.reference; do not edit by hand -->"
END = "<!-- end of what planc.ir.reference writes -->"


def page(text: str) -> str:
    """The page with the part between the markers written anew. Raises ValueError without markers."""
    if BEGIN not in text or END not in text:
        raise ValueError("the page has no markers for the reference")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    return f"{head}{BEGIN}\n\n{reference()}\n{END}{tail}"


def reference() -> str:
    """The verifier's rules, planc's ops with signature and facts, and the ATen ops that are declared."""
    return "\n".join([*_rules(), *_planc_ops(), *_aten_ops()])


def _rules() -> Iterator[str]:
    yield "### Invariants\n"
    yield from (f"- **{rule.name}**: {rule.says}" for rule in (*RULES, RERUN))
    yield ""


def _planc_ops() -> Iterator[str]:
    yield "### Ops of the dialect\n"
    yield "| op | divided by | may be quantized |"
    yield "|---|---|---|"
    for op in sorted(_namespace("planc"), key=lambda op: op.name):
        yield f"| `{_signature(op)}`<br>{_says(op)} | {_shards(op.shards)} | {_quantizable(op)} |"
    yield ""


def _aten_ops() -> Iterator[str]:
    yield "### ATen ops that are declared\n"
    yield "What else a graph holds is costed by the bytes of its operands, and reported.\n"
    names = {op.name.removeprefix("aten::").split(".")[0] for op in _namespace("aten")}
    for _, found in groupby(sorted(sorted(names), key=_bare), key=lambda name: _bare(name)[0]):
        yield f"{', '.join(f'`{name}`' for name in found)}  "
    yield ""


def _bare(name: str) -> str:
    return name.lstrip("_")


def _namespace(namespace: str) -> list[OpDef]:
    return [op for op in declarations() if op.target.namespace == namespace]


def _signature(op: OpDef) -> str:
    """`rms_norm(x, weight?, eps: float, mode: str)`: tensors bare, optional ones with a question mark."""
    schema = op.target._schema
    written = []
    for argument in schema.arguments:
        kind = str(argument.type)
        if isinstance(argument.type, torch.TensorType):
            mark = "!" if argument.alias_info is not None and argument.alias_info.is_write else ""
            written.append(f"{argument.name}{mark}")
        elif kind == "Optional[Tensor]":
            written.append(f"{argument.name}?")
        else:
            written.append(f"{argument.name}: {kind}")
    results = len(schema.returns)
    return f"{op.name.removeprefix('planc::')}({', '.join(written)})" + (
        f" -> {results}" if results > 1 else ""
    )


def _says(op: OpDef) -> str:
    """The first sentence of the op's own documentation."""
    definition = torch._library.custom_ops.OPDEFS.get(op.name)
    text = (definition._init_fn.__doc__ or "") if definition is not None else ""
    first = " ".join(text.split("\n\n")[0].split())
    return first.replace("|", "\\|")


def _shards(rules: tuple[ShardRule, ...]) -> str:
    return ", ".join(dict.fromkeys(rule.name for rule in rules)) or "whole"


def _quantizable(op: OpDef) -> str:
    return ", ".join(f"{name} ({role})" for name, role in op.quantizable.items()) or "-"


def main(arguments: list[str]) -> int:
    """Rewrites the page named on the command line."""
    path = Path(arguments[0] if arguments else "docs/ir.md")
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
