"""What an engine adds to its kernels: host time per step, layer and sequence, and a request's way in and out.

Random Llamas, two that differ in depth and one that is wider, are served by the engine and loaded in a closed
loop. Kernels are priced from the tables just measured; of the times that clients see,

    decode step of B sequences    kernel_factor * kernels + step_us + layer_us * layers + per_sequence_us * B
    first token of a prompt       kernel_factor * prefill_factor * kernels + host + request_ms

A kernel in an engine finds caches and memory that the host's work has used, which `kernel_factor` is for. The
models are larger than a CPU's caches, as those that are served: host code that ran a step ago is cold then.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import calibration, catalogue
from planc.cost_model.calibration import Number, ProfileDocument
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable
from planc.ir.trace import cache
from planc.passes.tabulate import load_table
from planc.runtime.calibrate.checkpoint import random_llama, words
from planc.runtime.calibrate.samples import Progress
from planc.runtime.calibrate.server import closed_loop, serving

_SLIM = {"hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 2}
_WIDE = {"hidden": 1280, "intermediate": 3456, "heads": 20, "kv_heads": 4}
_MODELS = ({"layers": 2, **_SLIM}, {"layers": 10, **_SLIM}, {"layers": 3, **_WIDE})
_BATCHES = (1, 4, 8, 16)
_SHORT, _OUTPUT = 8, 72
_ROUNDS = 9
_LONG = (256, 512)


@dataclass(frozen=True, slots=True)
class Served:
    """One model's times, s.

    steps   (sequences, mean context) -> time per token
    first   tokens of a prompt -> time to the first token
    """

    layers: int
    table: CostTable
    steps: Mapping[tuple[int, float], float]
    first: Mapping[int, float]


def measure(
    profile: ProfileDocument, program: str, variables: Mapping[str, str], progress: Progress | None = None
) -> ProfileDocument:
    """The profile with vLLM's host constants in it. `program`: the `vllm` command.

    Raises ToolFailed where the engine does not start.
    """
    served = []
    with tempfile.TemporaryDirectory(prefix="planc-calibrate-") as scratch:
        for number, shape in enumerate(_MODELS):
            if progress:
                progress(number, len(_MODELS), f"vLLM with {shape['layers']} layers")
            served.append(_served(Path(scratch), shape, program, variables))
    if progress:
        progress(len(_MODELS), len(_MODELS), "vLLM")
    return fitted(profile, served)


def _served(scratch: Path, shape: Mapping[str, int], program: str, variables: Mapping[str, str]) -> Served:
    folder = _checkpoint(shape)
    table = load_table(folder)
    block = catalogue.engine("vllm").block_size_on(catalogue.gpu("cpu"))
    options = {"dtype": "bfloat16", "max-model-len": 1024, "max-num-seqs": max(_BATCHES), "block-size": block}
    command = [program, "serve", str(folder), "--served-model-name", "tiny", "--no-enable-prefix-caching"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["--max-num-batched-tokens", "2048"]
    surroundings = {"VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{Path(program).parent}:{os.environ['PATH']}"}
    with serving(command, scratch / f"log-{folder.name}", {**surroundings, **variables}) as port:
        short, tokens = _prompt(folder, 16)
        closed_loop(port, "tiny", [short] * 4, 2, 8)  # warm-up
        prompts = [(short, tokens), *(_prompt(folder, wanted) for wanted in _LONG)]
        whole: dict[tuple[int, int], list[float]] = {}
        first: dict[int, list[float]] = {}
        for _ in range(_ROUNDS):
            for batch in _BATCHES:
                for output in (_SHORT, _OUTPUT):
                    whole.setdefault((batch, output), []).append(_slowest(port, short, batch, output))
            for prompt, length in prompts:
                (answer,) = closed_loop(port, "tiny", [prompt], 1, 1)
                first.setdefault(length, []).append(answer.ttft)
    context = tokens + (_SHORT + _OUTPUT) / 2
    return Served(
        shape["layers"],
        table,
        {(batch, context): _per_token(whole[batch, _OUTPUT], whole[batch, _SHORT]) for batch in _BATCHES},
        {length: min(times) for length, times in first.items()},
    )


def _checkpoint(shape: Mapping[str, int]) -> Path:
    """A small model in planc's cache: the engine compiles it once, and finds that again."""
    home = cache.folder() / "calibration"
    folder = home / f"llama-{'-'.join(str(size) for size in shape.values())}"
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=home, prefix="part-"))
        random_llama(part, **shape)
        with contextlib.suppress(OSError):  # another calibration was first
            part.rename(folder)
    return folder


def _per_token(long: Sequence[float], short: Sequence[float]) -> float:
    """Seconds per step: what long answers take more than short ones, per token.

    Not the time between tokens as they arrive: a server that is busy sends several at once. The shortest of
    all rounds, as of kernels: what else runs on the machine only ever adds to a time.
    """
    return (min(long) - min(short)) / (_OUTPUT - _SHORT)


def _slowest(port: int, prompt: str, batch: int, tokens: int) -> float:
    """Seconds until all of a batch are answered."""
    return max(answer.e2e for answer in closed_loop(port, "tiny", [prompt] * batch, batch, tokens))


def _prompt(folder: Path, tokens: int) -> tuple[str, int]:
    """A text of about so many tokens, and how many it has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = str(tokenizer.decode(tokenizer.encode(words(tokens, seed=tokens))[:tokens]))
    return text, len(tokenizer.encode(text))


def fitted(profile: ProfileDocument, served: Sequence[Served]) -> ProfileDocument:
    """Constants by least squares on relative errors: no host time below zero, no kernel faster than alone."""
    base = catalogue.engine("vllm")
    bare: dict[str, Number] = {
        name: Number(value=0.0) for name in ("step_us", "step_eager_us", "layer_us", "per_sequence_us")
    }
    bare |= {"prefill_factor": Number(value=1.0), "kernel_factor": Number(value=1.0)}
    engines = {**profile.engines, base.name: bare}
    with calibration.using(profile.model_copy(update={"engines": engines})):
        models = [_model(each.table, profile.device.name) for each in served]
        steps = [
            (float(model.seconds(StepLoad(batch, context))), 1.0, float(each.layers), float(batch), time)
            for each, model in zip(served, models, strict=True)
            for (batch, context), time in each.steps.items()
        ]
        *columns, seen = np.array(steps).T
        rows = np.stack(columns, axis=1)
        extra, step, layer, sequence = _least_squares(rows, seen - rows[:, 0], seen)
        host = [step + layer * each.layers + sequence for each in served]
        prompt, request = _prompts(served, models, host)
    factor = 1.0 + extra
    error = float(np.median(np.abs(1 - rows @ [factor, step, layer, sequence] / seen)))
    depths = ", ".join(str(each.layers) for each in served)

    def number(value: float, note: str) -> Number:
        return Number(
            value=round(value, 4),
            rows=len(seen),
            error=round(error, 4),
            low=float(min(_BATCHES)),
            high=float(max(_BATCHES)),
            source="fitted",
            note=f"{note}; over sequences, random Llamas of {depths} layers",
        )

    constants = {
        "step_us": number(step * 1e6, "time per token less kernels"),
        "layer_us": number(layer * 1e6, "time per token less kernels"),
        "per_sequence_us": number(sequence * 1e6, "time per token less kernels"),
        "kernel_factor": number(factor, "kernels in the engine, over alone"),
        "prefill_factor": number(prompt / factor, "first tokens of long prompts, over kernels in the engine"),
    }
    serving_constants = {
        **profile.serving.get(base.name, {}),
        "request_ms": number(request * 1e3, "first token of a short prompt less its step"),
        "lag_steps": Number(value=0.0, note="tokens leave as their step ends"),
    }
    return profile.model_copy(
        update={
            "engines": {**profile.engines, base.name: constants},
            "serving": {**profile.serving, base.name: serving_constants},
        }
    )


def _model(table: CostTable, gpu: str) -> StepModel:
    entry, engine = catalogue.gpu(gpu), catalogue.engine("vllm")
    return StepModel(table, EngineShape("vllm", entry.name), entry, Fabric(gpus_per_node=1), engine)


def _least_squares(rows: Any, rest: Any, seen: Any) -> list[float]:
    """A coefficient per column, those that would be negative set to zero and the others fitted again."""
    kept, values = list(range(rows.shape[1])), [0.0] * rows.shape[1]
    while kept:
        found = np.linalg.lstsq(rows[:, kept] / seen[:, None], rest / seen, rcond=None)[0]
        if np.all(found >= 0):
            for column, value in zip(kept, found, strict=True):
                values[column] = float(value)
            break
        kept = [column for column, value in zip(kept, found, strict=True) if value > 0]
    return values


def _prompts(
    served: Sequence[Served], models: Sequence[StepModel], host: Sequence[float]
) -> tuple[float, float]:
    """(factor on a prompt's kernels, seconds per request) from first tokens of short and long prompts."""
    kernels, rest, seen = [], [], []
    for each, model, own in zip(served, models, host, strict=True):
        for tokens, time in each.first.items():
            kernels.append(float(model.seconds(StepLoad(0, 1, tokens, 1))))
            rest.append(time - own)
            seen.append(time)
    rows = np.stack([np.array(kernels), np.ones(len(kernels))], axis=1) / np.array(seen)[:, None]
    factor, request = np.linalg.lstsq(rows, np.array(rest) / np.array(seen), rcond=None)[0]
    return max(float(factor), 0.5), max(float(request), 0.0)
