"""`planc run`: execute the compiled model with planc's own executor."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planc.commands.common import emit_json, json_option, out, progress, trust_option, weights_option
from planc.errors import FileMissing, FileUnreadable, InvalidField

if TYPE_CHECKING:
    from torch import Tensor

    from planc.planner.plan import Plan
    from planc.runtime.assemble import Compiled


@click.command("run")
@click.argument("bundle", type=click.Path())
@click.option("--prompt", multiple=True, help="Text to continue; several run together in one batch.")
@click.option(
    "--input",
    "input_file",
    type=click.Path(),
    help='JSON: a list of token-id lists (causal models); for a module {"name": nested lists} or a .pt file.',
)
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(min=1))
@weights_option
@click.option(
    "--random-weights", type=int, metavar="SEED", help="Run with random weights, to try things out."
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@trust_option
@json_option
def run_command(
    bundle: str,
    prompt: tuple[str, ...],
    input_file: str | None,
    max_new_tokens: int,
    weights: str | None,
    random_weights: int | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Run the compiled model of BUNDLE: prefill and decode graphs with a paged KV cache, greedy."""
    from planc.planner.plan import load_plan

    plan = load_plan(bundle)
    if bool(prompt) == (input_file is not None):
        raise InvalidField(
            where="command line",
            field="--prompt / --input",
            value=len(prompt),
            reason="give either prompts or an input file",
            mend='For example --prompt "The quick brown".',
        )
    from planc.runtime.assemble import assemble

    with progress() as say:
        say("tracing and applying the plan")
        compiled = assemble(plan, Path(bundle), trust_remote_code=trust_remote_code)
        say("loading weights")
        loaded = load_weights(plan, compiled, bundle, weights, random_weights)
        if plan.model.kind == "causal_lm":
            result = _generate(
                plan, compiled, loaded, prompt, input_file, max_new_tokens, device,
                weights_folder(plan, bundle, weights), say,
            )  # fmt: skip
        else:
            result = _forward(compiled, loaded, input_file, device)
    if as_json:
        emit_json(result)
        return
    console = out()
    for item in result["outputs"]:
        console.print(item if isinstance(item, str) else json.dumps(item), markup=False)
    console.print(f"{result['seconds']:.2f} s on {device}", style="dim")


def weights_folder(plan: Plan, bundle: str, given: str | None) -> Path | None:
    """Where the weights lie: what was given, else the request's model folder. None if there are none."""
    if given is not None:
        if not Path(given).is_dir():
            raise FileMissing(
                what="--weights", path=given, mend="Name the folder with the model's safetensors."
            )
        return Path(given)
    source = Path(plan.model.source)
    return source if source.is_dir() and any(source.glob("*.safetensors")) else None


def load_weights(
    plan: Plan, compiled: Compiled, bundle: str, given: str | None, seed: int | None
) -> dict[str, Tensor]:
    """The model's tensors by name: from a folder, the module itself, or at random on request."""
    from planc.runtime import weights

    if seed is not None:
        return weights.at_random(compiled.traced, seed)
    folder = weights_folder(plan, bundle, given)
    if folder is not None:
        dtype = weights.float_dtype(compiled.traced)
        return weights.from_folder(folder, dtype=dtype)
    if plan.model.kind != "causal_lm":
        return {}
    raise FileMissing(
        what="weights",
        path=plan.model.source,
        mend="Pass --weights FOLDER, or --random-weights SEED to try it without any.",
    )


def _generate(
    plan: Plan,
    compiled: Compiled,
    loaded: dict[str, Tensor],
    prompts: tuple[str, ...],
    input_file: str | None,
    max_new_tokens: int,
    device: str,
    folder: Path | None,
    say: Any,
) -> dict[str, Any]:
    from planc.runtime.executor import Executor
    from planc.runtime.weights import Tokenizer

    tokenizer = None
    if prompts:
        if folder is None:
            raise FileMissing(
                what="tokenizer",
                path=plan.model.source,
                mend="Pass --weights FOLDER, or token ids with --input.",
            )
        tokenizer = Tokenizer(folder)
        ids = [tokenizer.encode(text) for text in prompts]
    else:
        ids = _token_ids(Path(str(input_file)))
    replica = plan.replicas()[0]
    longest = sum(len(x) + max_new_tokens for x in ids)
    executor = Executor(
        compiled.graph("prefill"),
        compiled.graph("decode"),
        loaded,
        blocks=min(replica.kv_blocks, 2 * len(ids) + longest // replica.block_size),
        block_size=replica.block_size,
        device=device,
        max_num_seqs=min(replica.max_num_seqs, len(ids)),
        max_num_batched_tokens=replica.max_num_batched_tokens,
    )
    say("generating")
    start = time.perf_counter()
    found = executor.generate(ids, max_new_tokens, tokenizer.eos if tokenizer else None)
    seconds = time.perf_counter() - start
    outputs: list[Any] = [tokenizer.decode(x) for x in found] if tokenizer else found
    return {"outputs": outputs, "token_ids": found, "prompt_token_ids": ids, "seconds": seconds}


def _token_ids(file: Path) -> list[list[int]]:
    """Token ids from JSON: [[...], ...]. Raises FileMissing or FileUnreadable."""
    if not file.is_file():
        raise FileMissing(what="--input", path=file, mend="Name a JSON file.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileUnreadable(
            what="--input", path=file, format="JSON", reason=error, mend="Write a list of lists of token ids."
        ) from None
    if not (
        isinstance(raw, list)
        and raw
        and all(isinstance(x, list) and x and all(type(i) is int for i in x) for x in raw)
    ):
        raise FileUnreadable(
            what="--input",
            path=file,
            format="token ids",
            reason="it is not a list of non-empty lists of whole numbers",
            mend="Write for example [[1, 2, 3], [4, 5]].",
        )
    return raw


def _forward(
    compiled: Compiled, loaded: dict[str, Tensor], input_file: str | None, device: str
) -> dict[str, Any]:
    from planc.runtime.forward import read_inputs, run_module

    if input_file is None:
        raise InvalidField(
            where="command line",
            field="--prompt",
            value="",
            reason="this model is not a causal language model",
            mend="Pass its inputs with --input FILE.",
        )
    graph = compiled.graph("traced") if compiled.optimised is None else compiled.optimised
    inputs = read_inputs(graph, Path(input_file))
    start = time.perf_counter()
    outputs = run_module(graph, loaded, inputs, device=device)
    return {"outputs": [t.tolist() for t in outputs], "seconds": time.perf_counter() - start}
