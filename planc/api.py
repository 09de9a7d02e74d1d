"""The Python API: what `import planc` offers, and what the commands call.

Everything heavy (torch, transformers, OR-Tools) is imported inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planc.errors import FileMissing, InvalidField, PlancError
from planc.planner.plan import Plan, load_plan
from planc.planner.request import Request, load_request

if TYPE_CHECKING:
    from planc.cost_model.calibration import ProfileDocument
    from planc.cost_model.sensitivities import Sensitivities
    from planc.cost_model.table import CostTable
    from planc.planner.diff import PlanDiff
    from planc.planner.estimate import Estimate
    from planc.planner.explain import Explanation
    from planc.planner.explain_fleet import FleetExplanation
    from planc.planner.joint import JointPlan
    from planc.runtime.simulator.replay import Replay
    from planc.runtime.validation.report import ValidationReport

__all__ = [
    "compile",
    "compile_joint",
    "cost_table",
    "diff",
    "estimate",
    "explain",
    "explain_joint",
    "load_plan",
    "load_profile",
    "load_request",
    "replay",
    "sensitivities",
    "validate",
    "with_profile",
    "write_bundle",
    "write_joint",
]


def load_profile(path: str | Path) -> ProfileDocument:
    """Reads a profile that `planc calibrate` wrote. Raises FileMissing, FileUnreadable, InvalidField,
    UnknownField or UnknownName."""
    from planc.cost_model.calibration import load_profile as load

    return load(path)


@contextmanager
def with_profile(profile: ProfileDocument | str | Path | None, gpus: Iterable[str]) -> Iterator[None]:
    """Puts a profile in use; None leaves the one that is in use already, if any. Either must be of
    hardware that is among `gpus`, else raises InvalidField."""
    from planc.cost_model import calibration

    found = load_profile(profile) if isinstance(profile, str | Path) else profile
    with calibration.using(found):
        calibration.require(gpus, where="profile")
        yield


def _gpus(request: Request) -> list[str]:
    return [nodes.gpu for nodes in request.inventory.nodes]


def cost_table(
    request: Request, *, trust_remote_code: bool = False, progress: Callable[[str], None] | None = None
) -> CostTable:
    """The model's cost table: from the cache, or traced now (then torch is loaded)."""
    from planc.passes.tabulate import load_table
    from planc.planner.expert_load import with_expert_load

    if progress:
        progress(f"tracing {request.model}")
    return with_expert_load(request, load_table(request.model_path(), trust_remote_code=trust_remote_code))


def compile(
    request: Request | str | Path,
    *,
    time_limit: float | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
    profile: ProfileDocument | str | Path | None = None,
    simulate: bool = True,
) -> Plan:
    """Compiles a request to a plan, with the numbers of a measured profile where one is given.

    simulate   plays the workload against what formulas propose; a plan whose engines then miss an objective
               is given up for the next best

    Raises the errors of `planc.errors`: bad input (exit code 2) or Infeasible (3), which carries
    the smallest single relaxations that would make the request feasible.
    """
    from planc.planner.compile import plan

    if not isinstance(request, Request):
        request = load_request(request)
    table = cost_table(request, trust_remote_code=trust_remote_code, progress=progress)
    with with_profile(profile, _gpus(request)):
        referee = None
        if simulate:
            from planc.runtime.referee import Simulation

            referee = Simulation()
        found = plan(request, table, time_limit=time_limit, progress=progress, referee=referee)
    for one in (found, *found.front):
        one._model = request.model_path()
    return found


def compile_joint(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    time_limit: float | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
    profile: ProfileDocument | str | Path | None = None,
    simulate: bool = True,
) -> JointPlan:
    """Compiles a file that lists several models (`models:`) to a plan for each, on GPUs of their own.

    Raises as `compile` does.
    """
    from planc.planner.joint import load_joint, plans

    joint = load_joint(path, overrides)
    tables = {
        name: cost_table(request, trust_remote_code=trust_remote_code, progress=progress)
        for name, request in joint.requests.items()
    }
    referee = None
    if simulate:
        from planc.runtime.referee import Simulation

        referee = Simulation()
    with with_profile(profile, {gpu for request in joint.requests.values() for gpu in _gpus(request)}):
        found = plans(joint, tables, time_limit=time_limit, progress=progress, referee=referee)
    for name, plan in found.plans.items():
        plan._model = joint.requests[name].model_path()
    return found


def write_joint(plan: JointPlan, folder: str | Path) -> None:
    """Writes a bundle for each model, FOLDER/NAME, and `fleet.json`, which sums them up: whole or not at all.

    Raises InvalidBundle where `folder` is something other than such a fleet.
    """
    from planc.codegen.bundle import write_several
    from planc.planner.joint import document

    plans = {name: (one, model_config(one._model or one.model.source)) for name, one in plan.plans.items()}
    write_several(plans, document(plan), folder)


def estimate(
    request: Request | str | Path,
    *,
    trust_remote_code: bool = False,
    profile: ProfileDocument | str | Path | None = None,
    simulate: bool = True,
    **settings: Any,
) -> Estimate:
    """Evaluates one fixed configuration, without search: `estimate(request, tp=4, weights="fp8")`.

    simulate   plays the workload against the engine's scheduler too: percentiles, and what a load test
               reports. Settings of `LoadTest` (burst, stream_interval ...) say how it is sent.
    """
    from planc.planner.estimate import estimate as evaluate

    if not isinstance(request, Request):
        request = load_request(request)
    request, fixed = _with_load_test(request, settings)
    table = cost_table(request, trust_remote_code=trust_remote_code)
    with with_profile(profile, _gpus(request)):
        found = evaluate(request, table, **fixed)
        if not simulate or table.model.kind != "causal_lm":
            return found
        from planc.runtime.load_test import load_test

        return replace(found, simulated=load_test(request, table, found.replica, found.replicas).to_json())


def _with_load_test(request: Request, settings: Mapping[str, Any]) -> tuple[Request, dict[str, Any]]:
    """Settings of the load test go into the request; the others are returned."""
    from planc.planner.workload import LoadTest

    mine = {f"workload.load_test.{k}": v for k, v in settings.items() if k in LoadTest.model_fields}
    rest = {name: value for name, value in settings.items() if name not in LoadTest.model_fields}
    return request.overridden(mine) if mine else request, rest


def _router(what: Plan | Request) -> str:
    """The router that a plan decided on."""
    routing = what.routing if isinstance(what, Plan) else None
    return routing.policy if routing is not None else "round_robin"


def replay(
    what: Plan | Request | str | Path,
    trace: str | Path,
    *,
    format: str | None = None,
    router: str | None = None,
    limit: int | None = None,
    rate_scale: float = 1.0,
    seed: int = 0,
    trust_remote_code: bool = False,
    profile: ProfileDocument | str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Replay:
    """Simulates a plan (or a bundle) under a recorded trace; for a request the one configuration that
    `settings` name: `replay("request.yaml", "trace.csv", tp=2, replicas=4, prefill_replicas=1)`.

    format      "mooncake", "azure" or "vllm"; told by the file when left out
    router      left out: the plan's, in turn where it names none
    limit       the first so many requests only          rate_scale   requests come so many times as fast

    Raises FileMissing or FileUnreadable for the trace, UnknownName for a format or router, InvalidField
    for settings that cannot be, Infeasible when the model does not fit into memory.
    """
    from planc.planner.inventory import groups
    from planc.planner.request import make_request
    from planc.planner.trace import scan
    from planc.runtime.simulator import deployment
    from planc.runtime.simulator.replay import replay as run
    from planc.runtime.simulator.router import router as known

    if not isinstance(what, Plan | Request):
        place = Path(what)
        what = load_plan(place) if place.is_dir() or place.suffix == ".json" else load_request(place)
    if router is not None:
        known(router)  # unknown ones are refused before any work
    if progress:
        progress("reading the trace")
    scanned = scan(trace, format, limit, rate_scale)
    if isinstance(what, Plan):
        _no_settings(settings)
        request = make_request(what.request)
        table = _plan_table(what, trust_remote_code=trust_remote_code)
    else:
        request = what
        table = cost_table(request, trust_remote_code=trust_remote_code, progress=progress)
    with with_profile(profile, _gpus(request)):
        if isinstance(what, Plan):
            pools = what.pools
        else:
            pools = deployment.requested(request, table, scanned, settings)
        nodes = groups(request)
        sites = deployment.sites(pools, table, nodes, scanned.prompt + scanned.output)
        return run(
            sites,
            nodes,
            scanned,
            router=router or _router(what),
            limit=limit,
            rate_scale=rate_scale,
            seed=seed,
            slos=request.slos(),
            progress=progress,
        )


def _no_settings(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        raise InvalidField(
            where="replay",
            field=name,
            value=value,
            reason="a plan's configuration is fixed",
            mend="Replay a request with --set, or compile again.",
        )


def _plan_table(plan: Plan, *, trust_remote_code: bool) -> CostTable:
    """The cost table of a plan's model: that inside its bundle, else where the request had it."""
    from planc.passes.tabulate import load_table

    source = plan._model or plan.model.source
    if ":" not in str(source) and not Path(source).exists():
        raise FileMissing(
            what="model",
            path=source,
            mend="Run from the folder that the request's model path is relative to.",
        )
    return load_table(source, trust_remote_code=trust_remote_code)


def validate(
    points: str | Path,
    *,
    models: Sequence[str | Path] = (),
    profile: ProfileDocument | str | Path | None = None,
    **choices: Any,
) -> ValidationReport:
    """Predicts every measured serving point of a CSV file and compares.

    models    folders of model configurations, NAME.json each; default examples/models
    choices   as in `planc.runtime.validation.validate.validate`: by, options, rules, leave_out_cells ...
    """
    from planc.runtime.validation.setups import model_folders, model_tables
    from planc.runtime.validation.validate import gpus_of
    from planc.runtime.validation.validate import validate as run

    with with_profile(profile, gpus_of(points)):
        return run(points, model_tables(model_folders(models)), **choices)


def diff(
    old: Plan | str | Path,
    new: Plan | str | Path,
    *,
    attribute: bool = True,
    trust_remote_code: bool = False,
    profile: ProfileDocument | str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> PlanDiff:
    """What changed from one plan to the other, by meaning, and what each decision did to each metric.

    attribute   False: only what changed. Attribution evaluates configurations between the two plans, for
                which the model is needed: that inside a bundle, else where the request had it. Without it,
                or where the plans serve different models, `unattributed` says why there is none.
    """
    from planc.ir.trace import kind_of
    from planc.planner.diff import diff as compare
    from planc.planner.diff import same_model
    from planc.planner.request import make_request

    old, new = (plan if isinstance(plan, Plan) else load_plan(plan) for plan in (old, new))
    if not attribute or old == new or not same_model(old, new):
        return compare(old, new, without="it was not asked for")
    if progress:
        progress("evaluating what lies between the plans")
    missing: list[str] = []
    for plan in sorted((old, new), key=lambda plan: (plan._model is None, plan.fingerprint.plan)):
        try:
            if kind_of(plan._model or plan.model.source) == "factory" and not trust_remote_code:
                missing.append(f"{plan.model.source} is code, which runs when it is trusted only")
                continue
            table = _plan_table(plan, trust_remote_code=trust_remote_code)
            gpus = [gpu for one in (old, new) for gpu in _gpus(make_request(one.request))]
        except PlancError as error:
            missing.append(str(error))
            continue
        with with_profile(profile, gpus):
            return compare(old, new, table)
    return compare(old, new, without=" ".join(dict.fromkeys(missing)))


def sensitivities(
    model: str | Path,
    *,
    weights: str | Path,
    tokens: Sequence[Sequence[int]],
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
    **choices: Any,
) -> Sensitivities:
    """Measures how much each part of a model suffers from each number format alone, for
    `constraints.sensitivities`: `planc.sensitivities(model, weights=folder, tokens=ids).save("file.json")`.

    weights   the model's folder with safetensors      tokens   calibration prompts, token ids
    choices   as in `planc.runtime.sensitivity.sensitivities`: schemes, bands

    Raises what `planc.ir.trace.trace` raises, FileMissing, WeightsMismatch, InvalidField, UnknownName.
    """
    from planc.ir.trace import trace
    from planc.runtime import weights as loading
    from planc.runtime.sensitivity import sensitivities as measure

    traced = trace(model, trust_remote_code=trust_remote_code)
    tensors = loading.from_folder(weights, dtype=loading.float_dtype(traced))
    return measure(traced, tensors, tokens, progress=progress, **choices)


def explain(
    plan: Plan | str | Path,
    why_not: str | None = None,
    *,
    time_limit: float | None = None,
    trust_remote_code: bool = False,
    profile: ProfileDocument | str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    simulate: bool = True,
) -> Explanation:
    """Why a plan is as it is: which constraints bind and what a unit of each would buy, what each decision
    bought, where time and memory go.

    why_not      "tp=8,weights=bf16": what sank the best plan with these decisions, instead of all that
    time_limit   seconds of wall clock for solving varied requests (default 300)
    simulate     judges all fleets that are compared by playing the workload, where the plan was made so;
                 False: compares by formulas alone

    Raises FileMissing or InvalidBundle for the plan, FileMissing where its model or workload files are not
    found, InvalidField, UnknownField or UnknownName for an alternative that cannot be named.
    """
    from planc.planner.expert_load import with_expert_load
    from planc.planner.explain import explain as run
    from planc.planner.explain_asked import asked
    from planc.planner.request import make_request

    if why_not is not None:
        asked(why_not)  # what cannot be named is refused before any work
    found = plan if isinstance(plan, Plan) else load_plan(plan)
    request = make_request(found.request)
    table = with_expert_load(request, _plan_table(found, trust_remote_code=trust_remote_code))
    referee = None
    if simulate and found.simulated:
        from planc.runtime.referee import Simulation

        referee = Simulation()
    with with_profile(profile, _gpus(request)):
        return run(
            found,
            table,
            request=request,
            alternative=why_not,
            time_limit=time_limit,
            progress=progress,
            referee=referee,
        )


def explain_joint(
    folder: str | Path,
    *,
    time_limit: float | None = None,
    trust_remote_code: bool = False,
    profile: ProfileDocument | str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    simulate: bool = True,
) -> FleetExplanation:
    """Why the plans of several models on one inventory (a folder that `write_joint` wrote) are as they are:
    whom more of the inventory would serve, what sharing costs each, what the decisions of each bought.

    Parameters and errors as of `explain`.
    """
    from planc.planner.expert_load import with_expert_load
    from planc.planner.explain_fleet import explain_fleet
    from planc.planner.joint import Joint, load_fleet
    from planc.planner.request import make_request

    found = load_fleet(folder)
    requests = {name: make_request(plan.request) for name, plan in found.plans.items()}
    tables = {
        name: with_expert_load(requests[name], _plan_table(plan, trust_remote_code=trust_remote_code))
        for name, plan in found.plans.items()
    }
    referee = None
    if simulate and any(plan.simulated for plan in found.plans.values()):
        from planc.runtime.referee import Simulation

        referee = Simulation()
    with with_profile(profile, {gpu for request in requests.values() for gpu in _gpus(request)}):
        return explain_fleet(
            found,
            Joint(requests, found.limits),
            tables,
            time_limit=time_limit,
            progress=progress,
            referee=referee,
        )


def write_bundle(plan: Plan, folder: str | Path) -> None:
    """Writes a plan's bundle folder, whole or not at all.

    A model with a `config.json` has it copied into the bundle, which then needs nothing but the weights.
    Raises InvalidBundle where `folder` is something other than a bundle.
    """
    from planc.codegen.bundle import write

    write(plan, folder, config=model_config(plan._model or plan.model.source))


def model_config(source: str | Path) -> dict[str, Any] | None:
    """The model's own configuration, or None for a module or an exported program."""
    from planc.ir.trace import kind_of
    from planc.ir.trace.hf_config import read_config

    return read_config(source) if kind_of(source) == "hf" else None
