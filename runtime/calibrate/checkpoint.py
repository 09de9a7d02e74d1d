"""Checkpoints with random weights and a tokenizer of their own, for when nothing else is at hand."""

from __future__ import annotations

import random
from pathlib import Path

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_llama(
    folder: Path,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int = 32000,
    context: int = 2048,
    seed: int = 0,
) -> int:
    """Writes a bf16 Llama to `folder` (config, safetensors, tokenizer); returns its number of parameters.

    Every token of the vocabulary has a text, so that a server streams one piece of text per token.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder, vocabulary, seed),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def save_tokenizer(folder: Path, size: int, seed: int = 0) -> int:
    """A byte-level BPE tokenizer, trained on words drawn at random. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(size, seed)] * 2, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    whole.save_pretrained(folder)
    return len(whole)


def words(count: int, seed: int = 0) -> str:
    """So many words that mean nothing."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices(_LETTERS, k=draw.randint(3, 10))) for _ in range(count))
