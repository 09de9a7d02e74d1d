"""How it runs: executor, paged KV cache, scheduler, distributed ranks, verification.

Comes in: compiled graphs and weights. Goes out: tokens, and proof that they are right.
"""
