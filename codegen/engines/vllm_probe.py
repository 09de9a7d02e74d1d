"""Runs inside vLLM's environment: does vLLM's own parser and engine configuration accept these commands?

Standard input: a JSON list of {"name", "argv", "env"}, argv as given to `vllm`. Standard output: a JSON
object, name -> {"error": null or text, "settings": {...}}. Needs no weights and no GPU: vLLM finishes the
configuration for the platform that it runs on, here a CPU.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")


def parser() -> Any:
    """`vllm`'s command line, as its own `main` builds it for `serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    whole = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(whole.add_subparsers(dest="subparser"))
    return whole


def accepted(whole: Any, argv: list[str]) -> dict[str, Any]:
    """What vLLM made of one command."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    args = whole.parse_args(argv)
    if args.model_tag:
        args.model = args.model_tag
    validate_parsed_serve_args(args)
    found = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    parallel, scheduler, cache = found.parallel_config, found.scheduler_config, found.cache_config
    return {
        "architecture": found.model_config.architecture,
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "data_parallel": parallel.data_parallel_size,
        "expert_parallel": parallel.enable_expert_parallel,
        "decode_context_parallel": parallel.decode_context_parallel_size,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "chunked_prefill": scheduler.enable_chunked_prefill,
        "max_model_len": found.model_config.max_model_len,
        "quantization": found.model_config.quantization,
        "dtype": str(found.model_config.dtype),
        "block_size": cache.block_size,
        "cache_dtype": cache.cache_dtype,
        "prefix_caching": cache.enable_prefix_caching,
        "num_gpu_blocks_override": cache.num_gpu_blocks_override,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "kv_role": found.kv_transfer_config.kv_role if found.kv_transfer_config else None,
        "served_model_name": found.model_config.served_model_name,
    }


def main() -> None:
    answers: dict[str, Any] = {}
    out, sys.stdout = sys.stdout, sys.stderr  # vLLM prints; the answer must stand alone
    whole = parser()
    for given in json.load(sys.stdin):
        said = io.StringIO()
        os.environ.update(given["env"])
        try:
            with contextlib.redirect_stderr(said):
                settings = accepted(whole, given["argv"])
            answers[given["name"]] = {"error": None, "settings": settings}
        except SystemExit:
            answers[given["name"]] = {"error": said.getvalue().strip().splitlines()[-1], "settings": {}}
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            traceback.print_exc()
            where = f"{os.path.basename(last.filename)}:{last.lineno}"
            text = f"{type(error).__name__}: {error} ({where})"
            answers[given["name"]] = {"error": text, "settings": {}}
        finally:
            for name in given["env"]:
                os.environ.pop(name, None)
    json.dump(answers, out)


if __name__ == "__main__":
    main()
