"""Prefill and decode pools of a measured point in the simulator: its schedulers, or an equal share of them.

Where both pools have a common factor of schedulers, they are that many deployments side by side, each with
its share of the clients; one of them is simulated.
"""

from __future__ import annotations

import math
from dataclasses import replace

from planc.cost_model.collectives import transfer_seconds
from planc.runtime.simulator import Load, Records, Server
from planc.runtime.simulator.disaggregated import simulate_disaggregated
from planc.runtime.validation.setups import Engine, Setup

#: seats of a decode scheduler, where none are stated, over its even share of the clients: a router does not
#: spread them evenly
_SEATS = 4


def slices(setup: Setup, prefill: Engine) -> int:
    """Equal deployments that both pools divide into."""
    return math.gcd(_schedulers(prefill), _schedulers(setup.decode))


def simulate_pools(
    setup: Setup, prefill: Engine, prompts: Server, decodes: Server, load: Load, seed: int
) -> Records:
    """Requests of one slice's clients; `prompts` and `decodes` are a scheduler of each pool."""
    share = slices(setup, prefill)
    most = max(prefill.budget // max(int(setup.harness.length_low * setup.point.isl), 1), 1)
    prompts = _seated(prompts, most)
    if setup.harness.max_num_seqs is None:
        decodes = _seated(decodes, _SEATS * decodes.rules.max_num_seqs)
    wire = setup.fabric.outer(setup.gpu)
    per_token = float(prefill.memory.kv_bytes_per_token)
    return simulate_disaggregated(
        [prompts] * (_schedulers(prefill) // share),
        [decodes] * (_schedulers(setup.decode) // share),
        load,
        transfer_s=lambda tokens: float(transfer_seconds(per_token * tokens, wire)),
        first_token=setup.profile.serving.first_token,
        seed=seed,
    )


def _schedulers(engine: Engine) -> int:
    return engine.workers * engine.shape.dp


def _seated(server: Server, seats: int) -> Server:
    return replace(server, rules=replace(server.rules, max_num_seqs=seats))
