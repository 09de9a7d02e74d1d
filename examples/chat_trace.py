"""A made-up trace in Mooncake's format: conversations that share a system prompt and grow turn by turn.

python examples/chat_trace.py examples/traces/chat.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from itertools import count
from pathlib import Path

BLOCK, SYSTEM, CONVERSATIONS, SECONDS = 512, 1024, 80, 120


def requests(seed: int = 7) -> list[dict[str, object]]:
    """Turns of all conversations by time. A block's hash names everything up to its end."""
    draw, names = random.Random(seed), count(SYSTEM // BLOCK)
    rows: list[dict[str, object]] = []
    for _ in range(CONVERSATIONS):
        blocks, tokens, now = list(range(SYSTEM // BLOCK)), SYSTEM, draw.uniform(0, SECONDS)
        for _ in range(draw.randint(1, 5)):
            tokens += int(draw.lognormvariate(5.5, 0.9)) + 1
            output = min(int(draw.lognormvariate(5.3, 0.6)) + 1, 1000)
            blocks += [next(names) for _ in range(-(-tokens // BLOCK) - len(blocks))]
            rows.append(
                {
                    "timestamp": int(1000 * now),
                    "input_length": tokens,
                    "output_length": output,
                    "hash_ids": list(blocks),
                }
            )
            blocks = blocks[: tokens // BLOCK]  # a block that was not full will be another one
            tokens += output
            now += output * 0.03 + draw.expovariate(1 / 10)
    return sorted(rows, key=lambda row: int(str(row["timestamp"])))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in requests()), encoding="utf-8")
