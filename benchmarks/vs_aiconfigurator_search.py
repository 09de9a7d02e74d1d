"""planc's search over engines that aiconfigurator prices.

Each engine shape of aiconfigurator's own menu gets its best batch and chunk size by `cli_estimate`; planc's
master problem (`planc.planner.solve`) then picks how many of which, aggregated and disaggregated, on the
islands of the inventory. The rules are aiconfigurator's: the same objectives, memory checks and corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vs_aiconfigurator_oracle import NODE, Formats, Oracle, Task

from planc.planner.solve import Column, Flow, Limits, solve

#: of its disaggregated search: what imbalance leaves of the throughput of prefill and of decode workers
PREFILL_SHARE, DECODE_SHARE = 0.9, 0.92
MOST_SEQS = 512
PREFILL_TOKENS = 16384
_POINTS = 8
_WINDOW = 8
#: shapes whose whole-prompt throughput is within this share of the best of their size get every chunk size
_NEAR = 0.75

Shape = tuple[int, int, int, int, int]  # tp, pp, dp, moe_tp, moe_ep
Role = Literal["agg", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One engine with its settings. `load`: tokens/s that it adds (a half: if the other half keeps up)."""

    role: Role
    shape: Shape
    formats: str
    batch: int
    tokens: int  # prompt tokens of a step of an aggregated engine
    whole: bool  # whole prompts in its steps
    load: float
    arguments: Mapping[str, Any]

    @property
    def gpus(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def label(self) -> str:
        tp, pp, dp, moe_tp, moe_ep = self.shape
        degrees = {"tp": tp, "pp": pp, "dp": dp, "etp": moe_tp, "ep": moe_ep}
        text = "".join(f"{name}{n}" for name, n in degrees.items() if n > 1) or "tp1"
        tokens = f"/{self.tokens}" if self.role == "agg" else ""
        return f"{'' if self.role == 'agg' else self.role[0] + ':'}{text} b{self.batch}{tokens}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """tokens/s of the whole inventory; `items` are engines and their counts."""

    tokens_s: float
    items: tuple[tuple[Choice, int], ...]
    status: str

    @property
    def label(self) -> str:
        formats = {choice.formats for choice, _ in self.items} - {""}
        text = " + ".join(f"{count}x {choice.label}" for choice, count in self.items)
        return text + (f" ({', '.join(sorted(formats))})" if formats else "")


def chunk_sizes(isl: int) -> tuple[int, ...]:
    """Prompt tokens per step: aiconfigurator's own grid with chunked prefill."""
    most = max(8192, 2 * isl)
    large = max(1024, most // 8)
    fine = range(512, 8193, 512)
    return tuple(sorted({*fine, *range(8192 + large, most + 1, large), *whole_prompts(isl)}))


def whole_prompts(isl: int) -> tuple[int, ...]:
    """Its grid without chunked prefill."""
    step = max(isl, 512)
    return tuple(sorted({*range(step, max(8192, 2 * isl) + 1, step), isl, 2 * isl}))


def best_batch(loads: Callable[[Sequence[int]], Sequence[float]], least: int, most: int) -> tuple[float, int]:
    """(highest load, batch) over batches in [least, most]; loads of what breaks a limit are 0.

    Zooms in on where the limits start to break, then looks at every batch near it: throughput and times are
    not monotone where a batch fills its last step.
    """
    known: dict[int, float] = {}

    def learn(batches: Sequence[int]) -> None:
        new = sorted({b for b in batches if least <= b <= most} - set(known))
        known.update(zip(new, loads(new), strict=True) if new else ())

    learn([round(least * (most / least) ** (i / _POINTS)) for i in range(_POINTS + 1)])
    while True:
        good = [b for b, load in known.items() if load > 0]
        if not good:
            return 0.0, 0
        last = max(good)
        after = min((b for b in known if b > last), default=last)
        if after - last <= 1:
            break
        step = max((after - last) // _POINTS, 1)
        learn(range(last + step, after, step))
    learn(range(last - _WINDOW, last + _WINDOW + 1))
    batch = max(known, key=lambda b: (known[b], -b))
    return known[batch], batch


class Menu:
    """Every engine of one task that may be worth buying.

    by_task   prices are those of aiconfigurator's `Task`, where `cli_estimate` has unlike kernels
    """

    def __init__(self, task: Task, oracle: Oracle, *, by_task: bool = False) -> None:
        self.task, self.oracle = task, oracle
        shapes = oracle.ask("shapes", task)
        self.shapes: dict[str, list[Shape]] = {
            role: [tuple(shape) for shape in shapes[role]] for role in ("agg", "prefill", "decode")
        }
        self.same_tp: bool = shapes["same_tp"]
        self.common = asked_of(task) | ({"moe_quant_mode": shapes["experts"]} if shapes["experts"] else {})
        if by_task:
            self.common["task"] = task.asked
        self.choices: list[Choice] = []

    def priced(self) -> Menu:
        """With the best settings of every engine found."""
        for name, formats in {"": {}, **self.task.formats}.items():
            self.choices += [*self._aggregated(name, formats), *self._halves(name, formats)]
        return self

    def _aggregated(self, name: str, formats: Formats) -> Iterator[Choice]:
        """Whole prompts first; of shapes that come near the best of their size, every chunk size."""
        found: list[Choice] = []
        plain = whole_prompts(self.task.isl)
        for shape in self.shapes["agg"]:
            found += self._at(shape, plain, name, formats)
        best: dict[int, float] = {}
        for choice in found:
            best[choice.gpus] = max(best.get(choice.gpus, 0.0), choice.load)
        near = {c.shape for c in found if c.load >= _NEAR * best[c.gpus]}
        if not found:
            near = set(self.shapes["agg"])
        finer = [tokens for tokens in chunk_sizes(self.task.isl) if tokens not in plain]
        for shape in sorted(near):
            found += self._at(shape, finer, name, formats)
        yield from found

    def _at(self, shape: Shape, sizes: Sequence[int], name: str, formats: Formats) -> Iterator[Choice]:
        task = self.task
        for tokens in sizes:
            arguments = {"mode": "agg", **self.common, **formats, **_degrees(shape), "ctx_tokens": tokens}
            prompts = -(-tokens // task.isl)

            def loads(batches: Sequence[int], arguments: dict[str, Any] = arguments) -> list[float]:
                answers = self.oracle.estimate([arguments | {"batch_size": b} for b in batches])
                return [a["tokens_s"] if self.meets(a) else 0.0 for a in answers]

            load, batch = best_batch(loads, 1 if prompts == 1 else prompts + 1, MOST_SEQS)
            if load > 0:
                whole = tokens in whole_prompts(task.isl)
                chosen = arguments | {"batch_size": batch}
                yield Choice("agg", shape, name, batch, tokens, whole, load, chosen)

    def meets(self, answer: Mapping[str, Any]) -> bool:
        """An aggregated engine fits and holds its objectives, by aiconfigurator's own rules."""
        task = self.task
        return (
            "error" not in answer
            and not answer["queues"]
            and answer["ttft_ms"] <= task.ttft_ms
            and answer["tpot_ms"] <= task.tpot_ms
        )

    def _halves(self, name: str, formats: Formats) -> Iterator[Choice]:
        """Prefill and decode workers. An estimate prices a pair: each is asked beside one that works."""
        task = self.task
        common = {
            "mode": "disagg",
            **self.common,
            **formats,
            "prefill_num_workers": 1,
            "decode_num_workers": 1,
            "prefill_batch_size": 1,
            "decode_batch_size": 1,
        }
        every = sorted({*self.shapes["prefill"], *self.shapes["decode"]})
        pairs = [common | _degrees(s, "prefill_") | _degrees(s, "decode_") for s in every]
        works = [s for s, a in zip(every, self.oracle.estimate(pairs), strict=True) if "error" not in a]
        if not works:
            return
        for role in ("prefill", "decode"):
            other = "decode_" if role == "prefill" else "prefill_"
            most = max(PREFILL_TOKENS // task.isl, 1) if role == "prefill" else MOST_SEQS
            for shape in self.shapes[role]:
                partner = shape if shape in works else works[0]
                arguments = common | _degrees(shape, f"{role}_") | _degrees(partner, other)

                def loads(
                    batches: Sequence[int], role: Any = role, arguments: dict[str, Any] = arguments
                ) -> list[float]:
                    asked = [arguments | {f"{role}_batch_size": b} for b in batches]
                    return [self.half(role, a) for a in self.oracle.estimate(asked)]

                load, batch = best_batch(loads, 1, most)
                if load > 0:
                    chosen = arguments | {f"{role}_batch_size": batch}
                    yield Choice(role, shape, name, batch, 0, True, load, chosen)

    def half(self, role: Role, answer: Mapping[str, Any]) -> float:
        """tokens/s that one worker of a half lets through within its objective; 0 when it breaks it."""
        if "error" in answer:
            return 0.0
        if role == "prefill":
            meets = answer["ttft_ms"] < self.task.ttft_ms
            return float(answer["prefill_s"]) * PREFILL_SHARE * self.task.osl if meets else 0.0
        meets = answer["tpot_ms"] < self.task.tpot_ms
        return float(answer["decode_s"]) * DECODE_SHARE * self.task.osl if meets else 0.0

    def fleet(self, *, chunks: bool, formats: bool) -> Fleet | None:
        """The best fleet. chunks: prompts may be cut; formats: others than the checkpoint's may be used."""
        offered = [c for c in self.choices if (chunks or c.whole) and (formats or not c.formats)]
        splits = sorted({c.shape[0] for c in self.choices}) if self.same_tp else [0]
        flows = [Flow()]
        for split in splits:
            flows += [Flow(role="prefill", split=split), Flow(role="decode", split=split)]
        best: dict[tuple[int, int, str], Choice] = {}
        for choice in offered:
            split = splits.index(choice.shape[0]) if self.same_tp else 0
            flow = {"agg": 0, "prefill": 1 + 2 * split, "decode": 2 + 2 * split}[choice.role]
            key = flow, choice.gpus, choice.formats
            if key not in best or choice.load > best[key].load:
                best[key] = choice
        columns = [
            Column(
                group=0,
                pieces=max(gpus // NODE, 1),
                size=min(gpus, NODE),
                load=choice.load,
                weight=float(gpus),
                drop=0.0,
                watts=0.0,
                family=family,
                flow=flow,
            )
            for (flow, gpus, family), choice in best.items()
        ]
        limits = Limits(islands=(self.task.islands,), demand=None, flows=tuple(flows))
        found = solve(columns, limits) if columns else None
        if found is None:
            return None
        items = zip(best.values(), found.counts, strict=True)
        return Fleet(found.value, tuple((c, n) for c, n in items if n), found.status)


def confirmed(menu: Menu, fleet: Fleet) -> float:
    """tokens/s of a fleet by asking aiconfigurator about each of its engines once more, added up without the
    master problem. Raises AssertionError where an engine breaks an objective or the GPUs do not suffice."""
    assert sum(n * choice.gpus for choice, n in fleet.items) <= menu.task.gpus
    whole, halves = 0.0, dict[tuple[int, str], float]()
    for choice, count in fleet.items:
        answer = menu.oracle.estimate([dict(choice.arguments)], anew=True)[0]
        if choice.role == "agg":
            assert menu.meets(answer), (choice, answer)
            whole += count * answer["tokens_s"]
            continue
        load = menu.half(choice.role, answer)
        assert load > 0, (choice, answer)
        key = (choice.shape[0] if menu.same_tp else 0), choice.role
        halves[key] = halves.get(key, 0.0) + count * load
    for split in {split for split, _ in halves}:
        whole += min(halves.get((split, "prefill"), 0.0), halves.get((split, "decode"), 0.0))
    return whole


def asked_of(task: Task) -> dict[str, Any]:
    """What all estimates of a task have."""
    return {
        "model_path": task.model,
        "system_name": task.system,
        "backend_name": task.backend,
        "isl": task.isl,
        "osl": task.osl,
    }


def repriced(menu: Menu, row: Mapping[str, Any]) -> float:
    """tokens/s of a row of `cli_default` on the inventory, asked for one by one; 0 when it is refused."""
    if "(p)tp" in row:
        halves: dict[str, Any] = {}
        for role, mark in (("prefill", "(p)"), ("decode", "(d)")):
            names = ("tp", "pp", "dp", "moe_tp", "moe_ep")
            halves |= _degrees(tuple(int(row[mark + n]) for n in names), f"{role}_")  # type: ignore[arg-type]
            halves[f"{role}_batch_size"] = int(row[f"{mark}bs"])
            halves[f"{role}_num_workers"] = int(row[f"{mark}workers"])
        arguments = {"mode": "disagg", **menu.common, **halves}
    else:
        shape = tuple(int(row[n]) for n in ("tp", "pp", "dp", "moe_tp", "moe_ep"))
        settings = {"batch_size": int(row["bs"]), "ctx_tokens": int(row["ctx_tokens"])}
        arguments = {"mode": "agg", **menu.common, **_degrees(shape), **settings}  # type: ignore[arg-type]
    answer = menu.oracle.estimate([arguments])[0]
    cells = menu.task.gpus // int(row["num_total_gpus"])
    return cells * float(answer["tokens_s"]) if "error" not in answer else 0.0


def _degrees(shape: Shape, role: str = "") -> dict[str, int]:
    tp, pp, dp, moe_tp, moe_ep = shape
    found = {f"{role}tp_size": tp, f"{role}pp_size": pp, f"{role}attention_dp_size": dp}
    if moe_tp * moe_ep == tp * dp:
        found |= {f"{role}moe_tp_size": moe_tp, f"{role}moe_ep_size": moe_ep}
    return found
