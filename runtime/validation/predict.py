"""One point, predicted: its harness played against a simulated engine.

Attention data parallelism: one rank is simulated with its share of the clients, and all ranks are taken to
do the same at the same time, as their scheduler balances them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from planc.cost_model.catalogue import Provenance
from planc.cost_model.step import StepLoad, StepModel
from planc.errors import PlancError
from planc.planner.priors import priors
from planc.runtime.simulator import Clock, Load, Records, Rules, Server, closed_loop, simulate
from planc.runtime.simulator.load import Lengths, uniform
from planc.runtime.validation.constants import Constants
from planc.runtime.validation.disaggregated import simulate_pools, slices
from planc.runtime.validation.harness import hidden_launch_us
from planc.runtime.validation.lint import mean_lengths
from planc.runtime.validation.setups import Engine, Setup, Unpredictable, told

Band = tuple[float, float]

#: requests of a warm-up over the concurrency
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Times:
    """What a simulated harness reports, ms: means over all requests, and TTFT without the first wave. TPOT is
    0 where answers are of one token."""

    tpot: float
    ttft: float
    ttft_steady: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Times in ms. `ttft_ms` is what the harness would report, `ttft_steady_ms` what it would without its
    start burst; `throughput` is tokens/s and GPU, by Little's law from both. `bands` are (low, high) of
    tpot, ttft and throughput."""

    tpot_ms: float
    ttft_ms: float
    ttft_steady_ms: float
    throughput: float
    source: Provenance
    bands: Mapping[str, Band]

    def value(self, metric: str) -> float:
        """tpot and ttft in ms, throughput in tokens/s and GPU."""
        if metric == "throughput":
            return self.throughput
        return self.tpot_ms if metric == "tpot" else self.ttft_ms


class Predictor:
    """Predicts setups; step models are made once per engine shape, clocks once per constants too."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._models: dict[object, StepModel] = {}
        self._clocks: dict[object, Clock] = {}

    def times(self, setup: Setup, constants: Constants) -> Times:
        """The harness against the engines, with these constants."""
        if setup.prefill is None:
            records = self._aggregated(setup, constants)
        else:
            records = self._pools(setup, setup.prefill, constants)
        steady = records.steady()
        several = records.tpot_s[records.output > 1]
        return Times(
            tpot=1e3 * float(np.mean(several)) if several.size else 0.0,
            ttft=1e3 * float(np.mean(records.ttft_s)),
            ttft_steady=1e3 * float(np.mean(steady.ttft_s)),
        )

    def predict(self, setup: Setup, constants: Constants | None = None) -> Prediction:
        """With the shipped constants unless others are given."""
        found = self.times(setup, constants or Constants.shipped(setup.profile))
        return prediction(setup, found, self._model(setup, setup.decode).source)

    # -- engines -------------------------------------------------------------------------

    def _model(self, setup: Setup, engine: Engine) -> StepModel:
        largest = setup.profile.cuda_graphs.largest
        graphs = engine.max_num_seqs if setup.harness.max_num_seqs else max(engine.max_num_seqs, largest)
        key = (setup.table.fingerprint, engine.shape, graphs, setup.profile.name, told(setup.harness))
        if key not in self._models:
            self._models[key] = StepModel(
                setup.table, engine.shape, setup.gpu, setup.fabric, setup.profile, max_num_seqs=graphs
            )
        return self._models[key]

    def ready(self, setup: Setup) -> None:
        """Makes the step times of a setup's engines. Raises Unpredictable where something has no price."""
        try:
            for engine in (setup.prefill, setup.decode):
                if engine is not None:
                    self.clock(setup, engine, Constants.shipped(setup.profile))
        except PlancError as error:
            raise Unpredictable(str(error)) from None

    def clock(self, setup: Setup, engine: Engine, constants: Constants) -> Clock:
        """Step times of an engine with these constants."""
        model = self._model(setup, engine)
        key = (id(model), constants, setup.harness.dependent_launch)
        if key not in self._clocks:
            own = copy.copy(model)  # kernels are prepared once; constants are read at every step
            if setup.harness.dependent_launch:
                constants = replace(constants, layer_us=constants.layer_us - _hidden_us(model))
            own.profile = constants.on(setup.profile)
            self._clocks[key] = Clock(own)
        return self._clocks[key]

    def _server(self, setup: Setup, engine: Engine, constants: Constants) -> Server:
        harness, model = setup.harness, self._model(setup, engine)
        rules = Rules.of(
            setup.profile,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.budget,
            stream_interval=harness.stream_interval,
            recv_interval=harness.recv_interval,
            prompts_per_step=harness.prompts_per_step,
            scheduling=harness.scheduling or setup.profile.scheduling,
            asynchronous=model.asynchronous if harness.asynchronous is None else harness.asynchronous,
            prefix_caching=harness.distinct_prompts is not None,
            request_ms=request_ms(setup, constants),
            lag_steps=constants.lag_steps + harness.batch_wait_steps,
        )
        return Server(
            self.clock(setup, engine, constants),
            rules,
            kv_blocks=cache_blocks(setup, engine),
            block_size=engine.memory.block_size,
        )

    # -- loads ---------------------------------------------------------------------------

    def _aggregated(self, setup: Setup, constants: Constants) -> Records:
        server = self._server(setup, setup.decode, constants)
        load = clients(setup, setup.decode.shape.dp)
        if setup.harness.distinct_prompts is None:
            return simulate(server, load, seed=self.seed)
        wave = load.concurrency or 1
        warm = _WARM_UP * wave
        records = simulate(server, _repeating(setup, load, warm, self.seed), seed=self.seed)
        return replace(records.only(np.arange(load.requests + warm) >= warm), wave=wave)

    def _pools(self, setup: Setup, prefill: Engine, constants: Constants) -> Records:
        prompts = self._server(setup, prefill, constants)
        decodes = self._server(setup, setup.decode, constants)
        load = clients(setup, slices(setup, prefill))
        return simulate_pools(
            setup, prefill, prompts, decodes, load, self._joint_s(setup, prefill, constants), self.seed
        )

    def _joint_s(self, setup: Setup, prefill: Engine, constants: Constants) -> float:
        """Of a full step's time, what each token of any attention rank takes of all of them."""
        model = self.clock(setup, prefill, constants).model
        joint = float(model.joint_seconds(StepLoad(0, 0, prefill.budget))[0])
        return constants.prefill_factor * joint / (prefill.budget * prefill.shape.dp)


def request_ms(setup: Setup, constants: Constants) -> float:
    """A request's way to the scheduler, as its client goes it."""
    return priors().kept_request_ms if setup.harness.keeps_connections else constants.request_ms


def _hidden_us(model: StepModel) -> float:
    """What dependent launch saves per layer."""
    layers = sum(cls.count for cls in model.table.classes if cls.layers)
    return hidden_launch_us() * model.launches / max(layers, 1)


def clients(setup: Setup, ranks: int) -> Load:
    """The closed loop of one of `ranks` equal schedulers."""
    point, harness = setup.point, setup.harness
    each = max(math.ceil(point.concurrency / ranks), 1)
    requests = max(round(each * harness.requests_per_client), 1)
    lengths = (_lengths(point.isl, setup), _lengths(point.osl, setup))
    ramp = 0.0 if harness.burst else 1.0
    return closed_loop(each, requests, *lengths, burst=harness.burst, ramp_s=ramp)


def _repeating(setup: Setup, load: Load, warm: int, seed: int) -> Load:
    """The load after `warm` requests of its warm-up, with prompts drawn at random from a few."""
    block = setup.decode.memory.block_size
    count = setup.harness.distinct_prompts or 1
    prompts = [tuple(range(k << 32, (k << 32) + setup.point.isl // block)) for k in range(count)]
    requests = load.requests + warm
    drawn = np.random.default_rng(seed).integers(count, size=requests)
    return replace(
        load,
        requests=requests,
        warm_up=warm,
        prefix=[prompts[i] for i in drawn],
        prefix_block=block,
    )


def _lengths(stated: int, setup: Setup) -> Lengths:
    low, high = setup.harness.length_low * stated, setup.harness.length_high * stated
    return uniform(max(math.floor(low), 1), max(math.floor(high), 1))


def cache_blocks(setup: Setup, engine: Engine) -> int:
    """Blocks of the cache, counted as if every layer kept every token; more where layers forget."""
    prompt, answer = mean_lengths(setup)
    memory = engine.memory
    context = math.ceil((prompt + answer) / memory.block_size) * memory.block_size
    saved = memory.kv_bytes_per_token * context / float(memory.sequence_bytes(context))
    return int(memory.kv_blocks * max(saved, 1.0))


def prediction(setup: Setup, times: Times, source: Provenance) -> Prediction:
    """Times with throughput and bands."""
    _, answer = mean_lengths(setup)
    point = setup.point
    seconds = (times.ttft + max(answer - 1, 0.0) * times.tpot) * 1e-3
    throughput = point.concurrency * answer / seconds / point.gpus
    bands = priors().serving_bands(source)
    values = {"tpot": times.tpot, "ttft": times.ttft, "throughput": throughput}
    return Prediction(
        tpot_ms=times.tpot,
        ttft_ms=times.ttft,
        ttft_steady_ms=times.ttft_steady,
        throughput=throughput,
        source=source,
        bands={name: (bands[name][0] * value, bands[name][1] * value) for name, value in values.items()},
    )
