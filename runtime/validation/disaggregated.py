"""Prefill and decode pools of a measured point in the simulator: its schedulers, or an equal share of them.

Where both pools have a common factor of schedulers, they are that many deployments side by side, each with
its share of the clients; one of them is simulated. Where prompts are bound to an attention rank on arrival
(`Harness.prompt_router`), all ranks of a prefilling engine are, in lockstep; where an engine shares out what
waits at every step (TensorRT-LLM), its ranks do the same.
"""

from __future__ import annotations

import math
from dataclasses import replace

from planc.cost_model.collectives import transfer_seconds
from planc.runtime.simulator import Load, Records, Server
from planc.runtime.simulator.cluster import Lockstep
from planc.runtime.simulator.disaggregated import simulate_disaggregated
from planc.runtime.simulator.router import LeastLoaded, RandomRank, RoundRobin, Router
from planc.runtime.validation.setups import Engine, Setup

#: seats of a decode scheduler, where none are stated, over its even share of the clients: a router does not
#: spread them evenly
_SEATS = 4


def slices(setup: Setup, prefill: Engine) -> int:
    """Equal deployments that both pools divide into."""
    each = prefill.workers if setup.harness.prompt_router else _schedulers(prefill)
    return math.gcd(each, _schedulers(setup.decode))


def simulate_pools(
    setup: Setup, prefill: Engine, prompts: Server, decodes: Server, load: Load, joint_s: float, seed: int
) -> Records:
    """Requests of one slice's clients; `prompts` and `decodes` are a scheduler of each pool, `joint_s` as in
    `Lockstep`."""
    share, ranks = slices(setup, prefill), prefill.shape.dp
    fit = prefill.budget // max(int(setup.harness.length_low * setup.point.isl), 1)
    prompts = _seated(prompts, setup.harness.prompt_seats or fit + 1)
    if setup.harness.max_num_seqs is None:
        decodes = _seated(decodes, _SEATS * decodes.rules.max_num_seqs)
    wire, per_token = setup.fabric.outer(setup.gpu), handed_over(prefill, setup.decode)
    count = _schedulers(prefill) // share
    bound = setup.harness.prompt_router is not None and ranks > 1
    crews = [Lockstep(range(first, first + ranks), joint_s) for first in range(0, count, ranks) if bound]
    return simulate_disaggregated(
        [prompts] * count,
        [decodes] * (_schedulers(setup.decode) // share),
        load,
        transfer_s=lambda tokens: float(transfer_seconds(per_token * tokens, wire)),
        prompt_router=_router(setup.harness.prompt_router, ranks, seed),
        first_token=setup.profile.serving.first_token,
        keeps_seat=setup.profile.serving.keeps_seat,
        lockstep=crews,
        seed=seed,
    )


def handed_over(prefill: Engine, decode: Engine) -> float:
    """Bytes of a token's cache that the busiest link carries: each GPU that decodes fetches what it will hold
    (of a latent cache everything), those that prefilled share the sending."""
    return float(decode.memory.kv_bytes_per_token) * max(decode.shape.tp / prefill.shape.tp, 1.0)


def _router(name: str | None, ranks: int, seed: int) -> Router:
    """How prompts find an attention rank."""
    if name == "random_rank":
        return RandomRank(ranks, seed)
    return RoundRobin() if name == "round_robin" else LeastLoaded()


def _schedulers(engine: Engine) -> int:
    return engine.workers * engine.shape.dp


def _seated(server: Server, seats: int) -> Server:
    return replace(server, rules=replace(server.rules, max_num_seqs=seats))
