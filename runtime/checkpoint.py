"""Writing the quantized checkpoint that a plan asks for, shard by shard: a model of any size streams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from planc.errors import FileMissing, FileUnreadable, WeightsMismatch
from planc.ir.trace.hf_config import read_config
from planc.passes.quantize_config import Recipe, Rule, recipe_config
from planc.passes.quantize_pack import is_target, pack

INDEX = "model.safetensors.index.json"
_SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")


def write_checkpoint(
    source: Path, target: Path, recipe: Recipe, *, progress: Callable[[str], None] | None = None
) -> dict[str, int]:
    """Packs the weights of a model folder into `target` (an empty folder): {"tensors", "packed", "bytes"}.

    Tokenizer and other small files are copied, `config.json` gains its `quantization_config`.
    Raises FileMissing, FileUnreadable, WeightsMismatch (already quantized, or without matrices that the
    recipe has a rule for) and InvalidField (a shape that the format cannot hold).
    """
    config = read_config(source)
    if config.get("quantization_config"):
        raise WeightsMismatch(
            path=source,
            reason="the checkpoint is quantized already",
            mend="Give the bf16 checkpoint, or plan with the format it has.",
        )
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise FileMissing(what="weights", path=source / "*.safetensors", mend="Name the model's folder.")
    placed: dict[str, str] = {}
    kept: set[str] = set()
    met: set[Rule] = set()
    counts = {"tensors": 0, "packed": 0, "bytes": 0}
    for number, shard in enumerate(shards, 1):
        if progress:
            progress(f"packing shard {number} of {len(shards)}")
        out: dict[str, Tensor] = {}
        for name, tensor in _tensors(shard):
            counts["tensors"] += 1
            if is_target(name, tensor):
                module = name.removesuffix(".weight")
                rule, kind = recipe.rule(module), recipe.checkpoint(module)
                met |= {rule} if rule else set()
                counts["packed"] += kind is not None
                out |= pack(name, tensor, kind) if kind is not None else {name: tensor}
            else:
                out[name] = tensor
                if name.endswith(".weight") and tensor.dim() == 2:
                    kept.add(name.removesuffix(".weight"))
        out = {name: tensor.contiguous() for name, tensor in out.items()}
        save_file(out, target / shard.name, metadata={"format": "pt"})
        placed |= dict.fromkeys(out, shard.name)
        counts["bytes"] += sum(t.numel() * t.element_size() for t in out.values())
    missed = next((rule for rule in recipe.rules if rule not in met), None)
    if missed is not None:
        raise WeightsMismatch(
            path=source,
            reason=f"no matrix of theirs is in {missed.module} of layer {missed.layers[0]}",
            mend="Routed experts that lie in one tensor are not packed in a format of their own.",
        )
    if len(shards) > 1:
        index = {"metadata": {"total_size": counts["bytes"]}, "weight_map": dict(sorted(placed.items()))}
        _write_json(target / INDEX, index)
    config["quantization_config"] = recipe_config(recipe, kept)
    _write_json(target / "config.json", config)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _SKIPPED and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    return counts


def _tensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileUnreadable(
            what="weights", path=shard, format="safetensors", reason=error, mend="Is it whole?"
        ) from error


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
