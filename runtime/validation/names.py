"""Names as others spell them: models, GPUs, engines and formats of measured points, in planc's spelling.

    meta-llama/Llama-3.3-70B-Instruct-FP8 -> llama-3.3-70b     H100 SXM  -> h100_sxm
    TensorRT-LLM -> trtllm                                      bfloat16  -> bf16

What is not recognised is left as it is, for a message that quotes it.
"""

from __future__ import annotations

import re
from pathlib import Path

from planc.cost_model import catalogue
from planc.errors import PlancError

#: models of one architecture and size under the name of one of them
ARCHITECTURES = {
    "deepseek-v3": "deepseek-r1",
    "deepseek-v3.1": "deepseek-r1",
    "llama-3.3-70b": "llama-3.1-70b",
    "llama-3-70b": "llama-3.1-70b",
    "llama-3-8b": "llama-3.1-8b",
    "kimi-k2": "kimi-k2.5",
    "kimi-k2.6": "kimi-k2.5",
    "minimax-m2": "minimax-m2.5",
    "minimax-m2.1": "minimax-m2.5",
    "minimax-m2.7": "minimax-m2.5",
    "glm-5.1": "glm-5",
}

#: what follows a model's name and says nothing of its architecture: what it was trained to, when, and the
#: checkpoint's format
_TAILS = re.compile(
    r"-(instruct|chat|it|base|thinking|hf|v0\.\d|\d{4}|(nv|mx)?fp4(-v\d)?|fp8|bf16|int4|int8|awq|gptq|w4a16|w8a8"
    r"|dynamic|static|pertensor|block|16e|128e|17b)$"
)
_ENGINES = {"tensorrtllm": "trtllm", "tensorrt": "trtllm", "trt": "trtllm", "trtllm": "trtllm"}
_FORMATS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "fp4": "nvfp4",
    "int4": "w4a16",
    "int4_wo": "w4a16",
    "awq": "w4a16",
    "gptq": "w4a16",
    "w8a8_fp8": "fp8",
    "fp8_static": "fp8",
    "fp8_dynamic": "fp8",
    "fp8_e4m3": "fp8",
    "float8": "fp8",
    "fp8_blockwise": "fp8_block",
    "w8a8": "int8",
    "w8a8_int8": "int8",
}


def model_name(text: str) -> str:
    """Of a checkpoint's name: lower case, without its owner and what follows the size. Paths stay."""
    if Path(text).exists():
        return text
    name = re.sub(r"^meta-(?=llama)", "", text.rsplit("/", 1)[-1].lower().replace("_", "-"))
    while _TAILS.search(name):
        name = _TAILS.sub("", name)
    return name


def architecture(model: str) -> str:
    """The model by whose configuration and launch scripts another of the same architecture goes."""
    return ARCHITECTURES.get(model, model)


def gpu_name(text: str) -> str:
    """The catalogue's name."""
    try:
        return catalogue.gpu(text.lower()).name
    except PlancError:
        return text.lower()


def engine_name(text: str) -> str:
    """The catalogue's name; an orchestrator before it ("dynamo-sglang") is not part of it."""
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"^dynamo[-_ ]+", "", text.lower()))
    return _ENGINES.get(plain, plain if plain in catalogue.engines() else text.lower())


def format_name(text: str, model: str = "") -> str:
    """The catalogue's name. Four-bit floats of gpt-oss are those that it was trained in."""
    plain = re.sub(r"[-\s]+", "_", text.lower())
    if plain == "fp4" and model.startswith("gpt-oss"):
        return "mxfp4"
    return _FORMATS.get(plain, plain)
