"""Colours by meaning. Names are those of the style sheet's variables (`--blue` ...), which differ between
light and dark; they stay apart for colour-blind eyes (Okabe and Ito 2008)."""

from __future__ import annotations

#: kinds of work, in the order that bars and keys show them
WORK = {
    "attention": "blue",
    "attention projections": "sky",
    "MLP": "green",
    "experts": "vermilion",
    "LM head": "pink",
    "matrix products": "green",
    "norms, activations, copies": "yellow",
    "communication": "orange",
    "host and hand-over": "grey",
}

BOUND = {"compute": "vermilion", "memory": "blue", "link": "orange", "launch": "grey"}

#: kinds of engines by role, so that a look tells prefill (warm) from decode (green) from the rest
ROLES = {
    "aggregated": ("blue", "sky", "pink", "green", "vermilion", "orange", "yellow"),
    "encoder": ("pink", "blue", "sky", "green", "orange"),
    "prefill": ("orange", "vermilion", "yellow", "pink"),
    "decode": ("green", "sky", "blue", "pink", "yellow"),
}

CLASSES = ("blue", "orange", "green", "pink", "sky", "vermilion", "yellow")

MEMORY = {
    "weights_gib": ("weights", "blue"),
    "kv_cache_gib": ("KV cache", "green"),
    "activations_gib": ("activations", "orange"),
    "graphs_gib": ("CUDA graphs", "pink"),
    "overhead_gib": ("overhead", "grey"),
    "reserve_gib": ("reserve", "pale"),
}


def work(layer_class: str, site: str, op: str, bound: str) -> str:
    """The kind of work that an op is."""
    name, place = op.lower(), site.lower()
    if layer_class == "step":
        return "host and hand-over"
    if bound == "link":
        return "communication"
    if "experts" in name or place.endswith(".experts"):
        return "experts"
    if any(word in name for word in ("paged_", "::attention", "recurrence", "delta_rule")):
        return "attention"
    if not any(word in name for word in ("linear", "mm", "conv", "matmul", "einsum")):
        return "norms, activations, copies"
    if "lm_head" in place:
        return "LM head"
    if "attn" in place or "attention" in place:
        return "attention projections"
    if any(word in place for word in ("mlp", "ffn", "feed_forward", "gate_proj", "up_proj", "down_proj")):
        return "MLP"
    return "matrix products"
