"""`planc hardware`, `planc models`, `planc engines`: what the catalogue knows, with sources."""

from __future__ import annotations

from importlib import resources
from typing import Any

import click
import yaml

from planc.commands.common import emit_json, grid, json_option, number, out
from planc.cost_model import catalogue


@click.command("hardware")
@click.argument("name", required=False)
@json_option
def hardware_command(name: str | None, as_json: bool) -> None:
    """GPUs planc knows: peaks, memory, links, prices, and where each number is from."""
    if name is not None:
        _one(catalogue.gpu(name).model_dump(mode="json"), as_json)
        return
    known = catalogue.gpus().values()
    if as_json:
        emit_json([entry.model_dump(mode="json") for entry in known])
        return
    rows = [
        (
            entry.name,
            number(entry.peak_tflops.get("bf16", entry.peak_tflops.get("fp32", 0.0))),
            number(entry.peak_tflops["fp8"]) if "fp8" in entry.peak_tflops else "-",
            f"{entry.memory_gib:.0f}",
            number(entry.memory_gbytes_s),
            entry.nvlink_domain,
            number(entry.nvlink_gbytes_s) if entry.nvlink_gbytes_s else "-",
            number(entry.tdp_w),
            f"{entry.usd_per_hour:.2f}",
            entry.date,
        )
        for entry in known
    ]
    columns = (
        "name",
        "bf16 TFLOP/s",
        "fp8 TFLOP/s",
        "GiB",
        "GB/s",
        "domain",
        "link GB/s",
        "TDP W",
        "USD/h",
        "read on",
    )
    out().print(grid(columns, rows))
    out().print("Dense vendor peaks. `planc hardware NAME` shows one entry with its sources.", style="dim")


@click.command("engines")
@click.argument("name", required=False)
@json_option
def engines_command(name: str | None, as_json: bool) -> None:
    """Engines planc plans for: versions, defaults, formats per architecture, and sources."""
    if name is not None:
        _one(catalogue.engine(name).model_dump(mode="json"), as_json)
        return
    known = catalogue.engines().values()
    if as_json:
        emit_json([entry.model_dump(mode="json") for entry in known])
        return
    from planc.codegen.engines import WRITERS

    rows = [
        (
            entry.name,
            entry.version,
            ", ".join(entry.parallel),
            ", ".join(sorted(entry.archs)),
            "written" if entry.name in WRITERS else "priced only",
            entry.date,
        )
        for entry in known
    ]
    out().print(grid(("name", "version", "parallel", "architectures", "configuration", "read on"), rows))


@click.command("models")
@click.argument("name", required=False)
@json_option
def models_command(name: str | None, as_json: bool) -> None:
    """Model families that planc is tested on; any other model that exports is traced generically."""
    text = resources.files("planc.ir.trace").joinpath("models.yaml").read_text(encoding="utf-8")
    families: dict[str, Any] = yaml.safe_load(text)["families"]
    if name is not None:
        if name not in families:
            catalogue.unknown("model", name, "model family", list(families))
        _one({"name": name, **families[name]}, as_json)
        return
    if as_json:
        emit_json(families)
        return
    rows = [
        (key, entry["architecture"], entry["attention"], entry["mlp"], ", ".join(entry["configs"]))
        for key, entry in families.items()
    ]
    out().print(grid(("model_type", "architecture", "attention", "MLP", "configs tried"), rows))


def _one(entry: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(entry)
    else:
        click.echo(yaml.safe_dump(entry, sort_keys=False, allow_unicode=True), nl=False)
