"""Weights and tokenizer of a Hugging Face folder, and random weights for trying things out.

transformers' own loader reads the folder, so that renamed, merged or transposed tensors come out
under the names of its modules: the names that the trace has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from planc.errors import FileMissing, FileUnreadable, WeightsMismatch
from planc.ir.graph import Graph
from planc.ir.trace.hf_build import build
from planc.ir.trace.hf_config import read_config, transformers_config
from planc.runtime.binding import parameters


def of_module(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a module by name; tied ones appear under each of their names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def from_folder(folder: str | Path, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights of a folder with `config.json` and safetensors, by transformers' module names, on CPU.

    dtype: what to convert to; None keeps the checkpoint's own.
    Raises FileMissing; WeightsMismatch if the checkpoint does not fill the model or is quantized.
    """
    place = Path(folder)
    config = read_config(place)
    if not any(place.glob("*.safetensors")):
        raise FileMissing(
            what="weights",
            path=str(place / "*.safetensors"),
            mend="Name the folder that holds the model's safetensors files.",
        )
    _refuse_quantized(config, place)
    return of_module(load_model(place, config, dtype))


def load_model(place: Path, config: dict[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers model of a folder (eager attention and experts), checked to be filled."""
    from transformers import AutoModelForCausalLM

    settings = transformers_config(config, place.name)
    loader = cast(Any, AutoModelForCausalLM)  # its stubs do not know output_loading_info
    try:
        model, report = loader.from_pretrained(
            place,
            config=settings,
            dtype=dtype or "auto",
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsMismatch(
            path=str(place),
            reason=f"transformers could not load them ({type(error).__name__}: {error})",
            mend="Check that the folder's config.json belongs to its safetensors.",
        ) from error
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(found[0] if isinstance(found, tuple) else found) for found in report[problem])
        if names:
            raise WeightsMismatch(
                path=str(place),
                reason=f"{len(names)} {problem.replace('_', ' ')}, the first is '{names[0]}'",
                mend="Check that the folder's config.json belongs to its safetensors.",
            )
    result: nn.Module = model.eval().requires_grad_(False)
    return result


def _refuse_quantized(config: dict[str, Any], place: Path) -> None:
    quantized = config.get("quantization_config") or (config.get("text_config") or {}).get(
        "quantization_config"
    )
    if quantized:
        raise WeightsMismatch(
            path=str(place),
            reason=f"the checkpoint is quantized ({quantized.get('quant_method', 'unknown method')})",
            mend="planc's executor quantizes by itself: give the bf16 checkpoint.",
        )


def float_dtype(graph: Graph) -> torch.dtype:
    """The floating-point type that most of a graph's parameters have; fp32 if it has none."""
    elements: dict[torch.dtype, int] = {torch.float32: 0}
    for tensor in parameters(graph).values():
        if tensor.is_floating_point():
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    return max(elements, key=lambda dtype: elements[dtype])


def at_random(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a graph's source model, the same for the same seed, in the traced dtypes."""
    if graph.source.kind == "causal_lm" and graph.source.config:
        with torch.random.fork_rng(devices=[]):  # transformers' own initialisation draws from the global one
            torch.manual_seed(seed)
            return of_module(build(graph.source.config, dtype=float_dtype(graph), device="cpu", seed=seed))
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in sorted(parameters(graph).items()):
        if tensor.is_meta:
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                values /= tensor[0].numel() ** 0.5
            made[name] = values.to(tensor.dtype)
    return made


class Tokenizer:
    """Text to token ids and back, by the tokenizer files of a model folder."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        place = self._place = Path(folder)
        if not any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise FileMissing(
                what="tokenizer",
                path=str(place / "tokenizer.json"),
                mend="Name a folder with the model's tokenizer, or give token ids with --input.",
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError) as error:
            raise FileUnreadable(
                what="tokenizer",
                path=str(place),
                format="a tokenizer",
                reason=str(error),
                mend="Is it whole?",
            ) from error

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer(text)["input_ids"]]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a text: the tokenizer's and those of `generation_config.json`; may be empty."""
        found = {self._tokenizer.eos_token_id} - {None}
        generation = self._place / "generation_config.json"
        if generation.is_file():
            ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
            found.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
        return tuple(sorted(int(token) for token in found))
