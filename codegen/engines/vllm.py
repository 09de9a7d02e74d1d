"""vLLM: one folder per replica shape, with `config.yaml` and `launch.sh`, which lists the instances; a router
where prefill and decode are apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from planc.codegen.engines.checkpoint import native_format
from planc.codegen.engines.vllm_formats import QUANTIZATION_FILE, quantization_file, weights
from planc.codegen.engines.vllm_settings import environment, settings
from planc.codegen.shell import comment, quote
from planc.cost_model.parts import KV, scheme
from planc.planner.plan import Plan, Replica, Role, canonical_json
from planc.planner.routing import DEFAULT
from planc.version import __version__

FIRST_PORT = 8000
#: NIXL's handshake: a port for each data-parallel rank of an instance, instances this far apart
_SIDE_PORT, _SIDE_STEP = 5600, 64
_HALVES = ("prefill", "decode")
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Part:
    """The ranks of one instance that run on one node. `ranks`: data-parallel ranks before this node's."""

    node: str
    gpus: tuple[str, ...]
    first_dp: int
    dp_here: int


@dataclass(frozen=True, slots=True)
class Instance:
    """One replica of a shape. `parts` has one entry per node, in rank order; `share` of all requests are for
    it, of the traffic classes named."""

    number: int
    port: int
    parts: tuple[Part, ...]
    share: float = 1.0
    classes: tuple[str, ...] = ()

    @property
    def side_port(self) -> int:
        """Of NIXL's handshake."""
        return _SIDE_PORT + _SIDE_STEP * (self.port - FIRST_PORT)


@dataclass(frozen=True, slots=True)
class Shape:
    """Replicas that differ only in where they run."""

    folder: str
    role: Role
    replica: Replica
    instances: tuple[Instance, ...]


def render(plan: Plan, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Files below `engines/vllm/`, by relative path. config: the model's own configuration.

    Raises CheckFailed where vLLM cannot be told what the plan decided.
    """
    files: dict[str, str] = {}
    for shape in shapes(plan):
        files[f"{shape.folder}/config.yaml"] = _config(shape, plan, config)
        files[f"{shape.folder}/launch.sh"] = _launch(shape, plan, config)
        if (stored := quantization_file(shape.replica, plan)) is not None:
            files[f"{shape.folder}/{QUANTIZATION_FILE}"] = stored
    if _routed(plan):
        files["router.py"] = (Path(__file__).parent / "router.py").read_text(encoding="utf-8")
        files["router.json"] = _routes(plan)
    return files


def _routed(plan: Plan) -> bool:
    """Whether requests go through planc's router: between pools, or where a plan of vLLM alone chose how."""
    alone = all(replica.engine == "vllm" for replica in plan.replicas())
    return _apart(plan) or (alone and plan.routing is not None)


def _apart(plan: Plan) -> bool:
    return any(pool.role in _HALVES for pool in plan.pools)


def _routes(plan: Plan) -> str:
    """What the router knows: how to choose, and the engines of each set of traffic classes, by the part of
    the work they do."""
    routes: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for shape in shapes(plan):
        name = shape.role if shape.role in _HALVES else "whole"
        r = shape.replica
        held = {"cache_tokens": r.kv_blocks * r.block_size * r.cp * r.dp}
        for one in shape.instances:
            found = {"node": one.parts[0].node, "port": one.port, "share": one.share, **held}
            kind = (*one.classes, "" if name == "whole" else "apart")
            routes.setdefault(kind, {}).setdefault(name, []).append(found)
    listed = [{"classes": list(kind[:-1]), **engines} for kind, engines in routes.items()]
    policy = plan.routing.policy if plan.routing is not None else DEFAULT
    return canonical_json({"plan": plan.fingerprint.plan, "policy": policy, "routes": listed})


def readme(plan: Plan) -> str:
    """How to start it, for the bundle's README."""
    lines = ["## vLLM", ""]
    for shape in shapes(plan):
        nodes = max(len(instance.parts) for instance in shape.instances)
        lines += [
            f"`engines/vllm/{shape.folder}/`: {len(shape.instances)} {shape.role} instance(s), each "
            f"{_words(shape.replica)}.",
            "",
            "```",
            f"MODEL=/path/to/weights engines/vllm/{shape.folder}/launch.sh 0",
            "```",
            "",
            f"The argument is the instance, 0 to {len(shape.instances) - 1}; further options go to "
            "`vllm serve` as they are and win over `config.yaml`. `DRY_RUN=1` prints the command only.",
            "",
        ]
        if nodes > 1:
            lines += [
                f"An instance spans {nodes} nodes. Run the same line on each, with `HEAD_ADDR` the first "
                "node's address and `NODE_RANK` 0 on the first, 1 on the next, and so on.",
                "",
            ]
    if _apart(plan):
        lines += [
            "Prompts are computed by the prefill instances, their caches fetched by the decode instances "
            "through NIXL (`pip install nixl`). They agree on the way at `SIDE_HOST`, a node's address as "
            "others reach it (its own name if left out).",
            "",
        ]
    if _routed(plan):
        lines += [
            "Start all instances, then the router, which clients talk to; `--at` says where the plan's nodes "
            "are:",
            "",
            "```",
            "python engines/vllm/router.py --port 9000 "
            + " ".join(["--at", *(f"{node}=ADDRESS" for node in _nodes(plan))]),
            "```",
            "",
        ]
    return "\n".join(lines)


def shapes(plan: Plan) -> list[Shape]:
    """A plan's vLLM replicas by shape. Ports count up from 8000 over all instances of a plan."""
    grouped: dict[tuple[Role, str], list[tuple[Replica, tuple[str, ...]]]] = {}
    for pool in plan.pools:
        for replica in pool.replicas:
            if replica.engine == "vllm":
                same = replica.model_copy(update={"gpus": [], "traffic_share": 0.0})
                mine = grouped.setdefault((pool.role, same.model_dump_json()), [])
                mine.append((replica, tuple(pool.classes)))
    found: list[Shape] = []
    port = FIRST_PORT
    taken: set[str] = set()
    for (role, _), replicas in grouped.items():
        instances = []
        for number, (replica, classes) in enumerate(replicas):
            instances.append(Instance(number, port, _parts(replica), replica.traffic_share, classes))
            port += 1
        folder = _folder(role, replicas[0][0], taken)
        taken.add(folder)
        found.append(Shape(folder, role, replicas[0][0], tuple(instances)))
    return found


def _nodes(plan: Plan) -> list[str]:
    """Nodes with an instance's first GPU, in the plan's order."""
    return list(dict.fromkeys(i.parts[0].node for shape in shapes(plan) for i in shape.instances))


def _parts(replica: Replica) -> tuple[Part, ...]:
    """Ranks node by node. `gpus` lists them rank by rank, so a node's ranks are consecutive."""
    placed = [gpu.rpartition("/") for gpu in replica.gpus]
    nodes = list(dict.fromkeys(node for node, _, _ in placed))
    per_engine = max(1, len(placed) // replica.dp)
    parts, before = [], 0
    for node in nodes:
        here = tuple(index for at, _, index in placed if at == node)
        parts.append(Part(node, here, before // per_engine, max(1, len(here) // per_engine)))
        before += len(here)
    return tuple(parts)


def _folder(role: Role, replica: Replica, taken: set[str]) -> str:
    degrees = [
        ("tp", replica.tp),
        ("pp", replica.pp),
        ("dp", replica.dp),
        ("ep", replica.ep),
        ("cp", replica.cp),
    ]
    words = [
        *([] if role == "aggregated" else [role]),
        replica.gpu,
        *(f"{name}{degree}" for name, degree in degrees if degree > 1 or name == "tp"),
        replica.weights,
        *([f"kv-{replica.kv}"] if replica.kv != "bf16" else []),
        *(["mixed"] if replica.formats else []),
    ]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip(".-")
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique


def _config(shape: Shape, plan: Plan, config: Mapping[str, Any] | None) -> str:
    about = f"{comment(plan.model.name)}, {comment(_words(shape.replica))}"
    head = (
        f"# vllm serve <model> --config config.yaml\n# {about}\n"
        f"# Written by planc {__version__} from plan {plan.fingerprint.plan}: what was evaluated.\n"
    )
    return head + "".join(
        f"{key}: {_inline(value)}\n"
        for key, value in settings(shape.replica, plan, config, shape.role).items()
    )


def _inline(value: Any) -> str:
    """A YAML value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _launch(shape: Shape, plan: Plan, config: Mapping[str, Any] | None) -> str:
    environment_ = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=False
    )
    environment_.filters |= {"sh": quote, "comment": comment}
    replica = shape.replica
    source = plan.model.source
    nodes = max(len(instance.parts) for instance in shape.instances)
    spread = replica.dp > 1 and all(
        len(part.gpus) % (len(replica.gpus) // replica.dp) == 0 for part in shape.instances[0].parts
    )
    text = environment_.get_template("vllm_launch.sh.jinja").render(
        plan=plan,
        version=__version__,
        shape=shape,
        words=_words(replica),
        environment=environment(replica),
        on_cpu=replica.gpu == "cpu",
        processes=replica.tp * replica.pp * replica.dp,
        nodes=nodes,
        apart=shape.role in _HALVES,
        by_data=spread,
        exported=weights(replica, plan, config).exported,
        native=native_format(config),
        wanted=" and ".join(dict.fromkeys([replica.weights, *_exceptions(replica)])),
        default_model="" if source.endswith((".json", ".pt2")) or ":" in source else source,
    )
    return text + "\n"


def _exceptions(replica: Replica) -> list[str]:
    """Weight formats of parts that have another than most."""
    return [scheme(taken)[0] for part, taken in replica.formats.items() if not part.endswith(f":{KV}")]


def _words(replica: Replica) -> str:
    """A shape in one line, e.g. "4 x h200_sxm: tp 4, fp8 weights, bf16 KV"."""
    degrees = [
        ("tp", replica.tp),
        ("pp", replica.pp),
        ("dp", replica.dp),
        ("ep", replica.ep),
        ("cp", replica.cp),
    ]
    shown = ", ".join(f"{name} {degree}" for name, degree in degrees if degree > 1 or name == "tp")
    others = "".join(f", {part} {taken}" for part, taken in replica.formats.items())
    return f"{len(replica.gpus)} x {replica.gpu}: {shown}, {replica.weights} weights, {replica.kv} KV{others}"
