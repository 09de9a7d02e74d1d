"""`planc export`: engine files on their own; with weights, the quantized checkpoint the plan asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from planc.commands.common import emit_json, json_option, out, progress, weights_option
from planc.errors import FileMissing, InvalidField
from planc.files import whole_folder, write_files


@click.command("export")
@click.argument("bundle", type=click.Path())
@click.option("--engine", required=True, help="The engine to write files for, e.g. vllm.")
@click.option("-o", "--output", required=True, type=click.Path(), help="A new folder.")
@weights_option
@json_option
def export_command(bundle: str, engine: str, output: str, weights: str | None, as_json: bool) -> None:
    """Write the files that ENGINE needs to serve BUNDLE's plan: configuration and launch scripts. With
    --weights also the checkpoint in the plan's number formats, which the launch scripts then serve."""
    from planc.codegen.engines import writer
    from planc.planner.plan import load_plan

    plan = load_plan(bundle)
    config = json.loads(Path(plan._model).read_text(encoding="utf-8")) if plan._model else None
    texts = writer(engine).render(plan, config)
    if not texts:
        engines = ", ".join(sorted({r.engine for r in plan.replicas()}))
        raise InvalidField(
            where="export",
            field="--engine",
            value=engine,
            reason=f"this plan runs on {engines}",
            mend="Compile the request again with --engine.",
        )
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidField(
            where="export",
            field="--output",
            value=output,
            reason="it is there already",
            mend="Name a new folder.",
        )
    made: dict[str, Any] = {"output": output, "files": sorted(texts)}
    try:
        with whole_folder(target) as part:
            if weights is not None:
                made["checkpoint"] = _checkpoint(plan, Path(weights), part / "model")
                packed = json.loads((part / "model" / "config.json").read_text(encoding="utf-8"))
                texts = writer(engine).render(plan, packed)
            write_files(part, {**texts, "README.md": writer(engine).readme(plan) + "\n"})
    except OSError as error:
        raise InvalidField(
            where="export",
            field="--output",
            value=output,
            reason=f"it cannot be written ({error.strerror or error})",
            mend="Choose another folder.",
        ) from None
    if as_json:
        emit_json(made)
        return
    console = out()
    for name in made["files"]:
        console.print(str(target / name), markup=False)
    if "checkpoint" in made:
        found = made["checkpoint"]
        share = f"{found['packed']} of {found['tensors']} tensors packed as {found['format']}"
        console.print(f"{target / 'model'}: {share}, {found['bytes'] / 2**30:.2f} GiB", markup=False)


def _checkpoint(plan: Any, weights: Path, target: Path) -> dict[str, Any]:
    """Packs the weights for the plan's first replica. Raises InvalidField where there is nothing to pack."""
    from planc.codegen.engines.checkpoint import recipe
    from planc.passes.quantize_config import CHECKPOINTS
    from planc.runtime.checkpoint import write_checkpoint

    if not weights.is_dir():
        raise FileMissing(
            what="--weights", path=weights, mend="Name the folder with the model's safetensors."
        )
    replica = plan.replicas()[0]
    wanted = recipe(plan, replica)
    if wanted.usual not in CHECKPOINTS and not wanted.rules:
        raise InvalidField(
            where="export",
            field="--weights",
            value=str(weights),
            reason=f"a plan with {replica.weights} weights needs no packed checkpoint",
            mend="Serve the published checkpoint; leave --weights out.",
        )
    target.mkdir()
    with progress() as say:
        counts = write_checkpoint(weights, target, wanted, progress=say)
    return {"format": str(wanted), **counts}
