"""From a model's `config.json` to the transformers configuration of its text part.

planc compiles the language model only: of a multimodal configuration the `text_config` is taken.
Architectures that ship their own code but whose language model transformers has (DeepSeek-R1,
MiniMax-M2.5, Kimi-K2.5) are built with transformers' class, so no remote code runs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planc.errors import FileMissing, FileUnreadable, UnsupportedModel, UntrustedCode

#: model_type of a text part -> the model_type transformers knows it by.
SAME_AS = {"kimi_k2": "deepseek_v3", "kimi_k25": "deepseek_v3"}

#: Keys that describe a checkpoint or a training run, not the computation.
_IGNORED = (
    "auto_map",
    "quantization_config",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
)


def model_name(path: Path) -> str:
    """What a model is called: its file or folder, and the folder where the file is a mere `config.json`."""
    folder = path if path.is_dir() else path.parent
    name = path.name if path.is_dir() else path.stem
    return folder.resolve().name if name == "config" else name


def read_config(path: str | Path) -> dict[str, Any]:
    """The JSON object of a `config.json` or of the one inside a model folder.

    Raises FileMissing, or FileUnreadable when it is not a JSON object.
    """
    place = Path(path)
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise FileMissing(
            what="model",
            path=str(file),
            mend="Name a Hugging Face config.json or a folder that holds one.",
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileUnreadable(
            what="model", path=str(file), format="JSON", reason=str(error), mend="Is it a config.json?"
        ) from None
    if not isinstance(found, dict):
        raise FileUnreadable(
            what="model",
            path=str(file),
            format="a model configuration",
            reason=f"it holds a JSON {type(found).__name__}, not an object",
            mend="Name the model's config.json.",
        )
    return found


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's own configuration: `text_config` where there is one, else all of it."""
    inner = config.get("text_config")
    part = dict(inner) if isinstance(inner, Mapping) else dict(config)
    if "tie_word_embeddings" not in part and "tie_word_embeddings" in config:
        part["tie_word_embeddings"] = config["tie_word_embeddings"]
    return part


def transformers_config(
    config: Mapping[str, Any], name: str, *, trust_remote_code: bool = False, folder: Path | None = None
) -> Any:
    """The `PretrainedConfig` of the text part.

    Raises UnsupportedModel (no model_type, unknown architecture, values transformers refuses) and
    UntrustedCode (transformers lacks the architecture and the configuration points to code of its own).
    """
    part = text_part(config)
    given = part.get("model_type")
    if not isinstance(given, str) or not given:
        raise UnsupportedModel(
            model=name,
            reason="its configuration has no model_type",
            mend="Name a Hugging Face config.json, or give the model as 'package.module:factory'.",
        )
    model_type = SAME_AS.get(given, given)

    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if model_type not in KNOWN:
        if part.get("auto_map"):
            if trust_remote_code and folder is not None:
                return AutoConfig.from_pretrained(folder, trust_remote_code=True)
            raise UntrustedCode(
                model=name,
                what=", ".join(f"{k}: {v}" for k, v in sorted(dict(part["auto_map"]).items())),
                mend="Read it, then pass --trust-remote-code with the model's folder.",
            )
        near = difflib.get_close_matches(model_type, sorted(KNOWN), n=3)
        raise UnsupportedModel(
            model=name,
            reason=f"model_type '{given}' is not a causal language model of the installed transformers",
            mend=f"Did you mean {' or '.join(near)}?"
            if near
            else "Give the model as 'package.module:factory' or an exported .pt2.",
        )
    if model_type in ENCODERS and not part.get("is_decoder"):
        raise UnsupportedModel(
            model=name,
            reason=f"model_type '{given}' is an encoder, and this door is for causal language models",
            mend="Give it as 'package.module:factory' that returns the module and example inputs.",
        )
    values = {k: v for k, v in part.items() if k not in (*_IGNORED, "model_type")}
    try:
        return AutoConfig.for_model(model_type, **values)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UnsupportedModel(
            model=name,
            reason=f"transformers refuses its configuration ({' '.join(str(error).split())})",
            mend="Compare the named key with the model card's config.json.",
        ) from error
