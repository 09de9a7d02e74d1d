"""Prediction against measurement on this machine's CPU, from calibration to load test, in one run.

    python benchmarks/cpu_loop.py [--engine-python .venv-engines/bin/python]

1. calibrates the CPU: kernels of vLLM, and its host time on three small models (`planc calibrate`);
2. makes a Llama of 200 M parameters with random weights, a model that the calibration never saw;
3. compiles a plan for it on hardware `cpu` with the profile;
4. starts the bundle's own launch script and loads it with `vllm bench serve`, a closed loop of each size;
5. simulates the same requests (their lengths, as the generator drew them) and prints both.

Writes benchmarks/results/cpu_loop.json. Exit code 1 where TPOT or throughput is off by more than --limit.
What else runs on the cores is in the measured times and not in the profile. So the share of the cores that
others took is measured, and so is the pace of a product that streams weights from memory, over its fastest
during the calibration: on shared hosts it drifts though nothing else runs on this machine. A load test is
repeated if others took more than --busy or the pace was off by more than --drift, and the steadiest counts;
all are in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from planc import api
from planc.commands.calibrate import bar
from planc.cost_model import calibration, catalogue
from planc.cost_model.calibration import ProfileDocument, load_profile
from planc.planner.inventory import groups
from planc.planner.plan import Plan
from planc.planner.request import Request
from planc.runtime.calibrate import device as devices
from planc.runtime.calibrate import engine as engines
from planc.runtime.calibrate.checkpoint import random_llama
from planc.runtime.calibrate.server import serving
from planc.runtime.simulator import Rules, Server, closed_loop, simulate
from planc.runtime.simulator.deployment import sites

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu_loop.json"
ENGINE = str(ROOT / ".venv-engines" / "bin" / "python")  # what tests/engines/setup_vllm.sh makes
MODEL = {"hidden": 1024, "intermediate": 2816, "layers": 12, "heads": 16, "kv_heads": 4}
THREADS = max(1, len(os.sched_getaffinity(0)) - 1)  # as many as vLLM takes
METRICS = ("tpot_ms", "throughput", "ttft_ms")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--engine-python",
        default=ENGINE,
        help="interpreter of an environment with vLLM, default: %(default)s",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument(
        "--isl", type=int, default=128, help="mean prompt tokens, drawn from half to one and a half"
    )
    parser.add_argument("--osl", type=int, default=64, help="mean answer tokens, likewise")
    parser.add_argument("--requests", type=int, default=6, help="requests per client")
    parser.add_argument("--profile", help="a profile of this CPU, instead of calibrating now")
    parser.add_argument("--save-profile", type=Path, help="also keep the profile that this run calibrated")
    parser.add_argument("--model", type=Path, help="folder to keep the model in")
    parser.add_argument("--limit", type=float, default=0.15)
    parser.add_argument("--tries", type=int, default=3, help="load tests per size, while the machine is busy")
    parser.add_argument("--busy", type=float, default=0.05, help="share of the cores that others may take")
    parser.add_argument("--drift", type=float, default=0.08, help="how far the machine's pace may be off")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory(prefix="planc-cpu-loop-") as scratch:
        found = run(asked, Path(scratch))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"\nwritten to {asked.out}")
    return int(not found["within_limit"])


def run(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The whole loop; what it found."""
    program = Path(asked.engine_python).absolute().with_name("vllm")
    note(f"{os.cpu_count()} cores, load average {load()}")
    pace = Pace()
    profile = load_profile(asked.profile) if asked.profile else calibrated(asked.engine_python, program, pace)
    if asked.save_profile:
        profile.save(asked.save_profile)
    folder = asked.model or scratch / "llama-200m"
    if not (folder / "config.json").is_file():
        note("making the model")
        random_llama(folder, **MODEL)
    plan, request = compiled(folder, asked, profile)
    api.write_bundle(plan, scratch / "bundle")
    (script,) = (scratch / "bundle/engines/vllm").glob("*/launch.sh")
    note(f"plan {plan.fingerprint.plan}; starting {script.relative_to(scratch)}")
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}", "MODEL": str(folder)}
    rows = []
    print(LINE.format("", "clients", "predicted", "measured", "error", "others, pace"))
    with serving([script, "0"], scratch / "server.log", path) as port:
        for clients in asked.concurrency:
            tries: list[dict[str, Any]] = []
            while len(tries) < asked.tries and (not tries or unsteady(tries[-1], asked)):
                before = pace.now()
                found = measured(port, program, plan.model.name, folder, clients, asked, scratch)
                tries.append({**found, "pace": round((before + pace.now()) / 2, 3)})
            seen = min(tries, key=lambda one: one["others"] + abs(one["pace"] - 1))
            expected = predicted(plan, request, profile, clients, seen["lengths"])
            rows.append(compared(clients, expected, seen, tries))
    worst = {name: max(abs(row["error"][name]) for row in rows) for name in METRICS}
    good = all(worst[name] <= asked.limit for name in ("tpot_ms", "throughput"))
    note("worst errors: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in worst.items()))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": MODEL,
        "workload": {"isl": asked.isl, "osl": asked.osl, "requests_per_client": asked.requests},
        "machine": profile.machine.model_dump(mode="json"),
        "engines": {k: {n: v.value for n, v in fields.items()} for k, fields in profile.engines.items()},
        "serving": {k: {n: v.value for n, v in fields.items()} for k, fields in profile.serving.items()},
        "rows": rows,
        "worst": worst,
        "limit": asked.limit,
        "within_limit": good,
    }


class Pace:
    """How fast the machine streams a product's weights now, over its fastest so far."""

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)
        size = 2048
        self.weights = [torch.randn(size, size).to(torch.bfloat16) for _ in range(32)]  # beyond caches
        self.x = torch.randn(1, size).to(torch.bfloat16)
        self.best = self._seconds()

    def _seconds(self, samples: int = 25) -> float:
        """Median time of a sweep, s."""
        times = []
        for _ in range(samples):
            start = time.perf_counter()
            for weight in self.weights:
                torch.nn.functional.linear(self.x, weight)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def refer(self) -> None:
        """One more look at what the machine can do, between parts of the calibration."""
        self.best = min(self.best, self._seconds())

    def now(self) -> float:
        return self.best / self._seconds()


def unsteady(seen: Mapping[str, Any], asked: argparse.Namespace) -> bool:
    return bool(seen["others"] > asked.busy or abs(seen["pace"] - 1) > asked.drift)


def calibrated(python: str, program: Path, pace: Pace) -> ProfileDocument:
    """A profile of this CPU under vLLM, on as many threads as vLLM takes: all cores but one."""
    today = datetime.now(UTC).date().isoformat()
    settings = devices.Settings("cpu", python=str(Path(python).absolute()), engine="vllm", threads=THREADS)
    start = time.monotonic()
    note("calibrating: kernels")
    with bar() as progress:
        profile = devices.calibrate(settings, today, "benchmarks/cpu_loop.py", progress)
        pace.refer()
        note(f"calibrating: the engine, load average {load()}")
        profile = engines.measure(profile, str(program), {}, progress)
    pace.refer()
    constants = {name: number.value for name, number in profile.engines["vllm"].items()}
    note(f"calibrated in {time.monotonic() - start:.0f} s: {constants}")
    return profile


def compiled(folder: Path, asked: argparse.Namespace, profile: ProfileDocument) -> tuple[Plan, Request]:
    """The plan for this machine: one bf16 engine, for the largest concurrency."""
    most = max(asked.concurrency)
    request = Request.model_validate(
        {
            "model": str(folder),
            "inventory": {"nodes": [{"gpu": "cpu", "gpus_per_node": 1, "count": 1}]},
            "workload": {"isl": asked.isl, "osl": asked.osl, "concurrency": most},
            "constraints": {
                "engines": ["vllm"],
                "weights": ["bf16"],
                "activations": ["bf16"],
                "kv": ["bf16"],
                "max_num_seqs": [most],
                "max_num_batched_tokens": [2048],
                "gpu_memory_utilization": 0.15,
                "max_replicas": 1,
            },
        }
    )
    return api.compile(request, profile=profile), request


def measured(
    port: int, program: Path, name: str, folder: Path, clients: int, asked: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """What `vllm bench serve` reports, and the lengths of its requests in the order they were sent."""
    options = {
        "backend": "openai",
        "base-url": f"http://127.0.0.1:{port}",
        "model": name,
        "tokenizer": folder,
        "dataset-name": "random",
        "random-input-len": asked.isl,
        "random-output-len": asked.osl,
        "random-range-ratio": 0.5,
        "num-prompts": asked.requests * clients,
        "max-concurrency": clients,
        "num-warmups": clients,
        "temperature": 0,
        "seed": clients,
        "result-dir": scratch,
        "result-filename": f"bench-{clients}.json",
    }
    command = [program, "bench", "serve", "--ignore-eos", "--save-result", "--save-detailed"]
    command += [word for option, value in options.items() for word in (f"--{option}", value)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    start, busy, own = time.monotonic(), cpu_seconds(), own_seconds()
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    spent = (time.monotonic() - start) * (os.cpu_count() or 1)
    others = max((cpu_seconds() - busy) - (own_seconds() - own), 0.0) / spent
    if done.returncode:
        raise SystemExit(f"vllm bench serve failed:\n{done.stderr[-2000:]}")
    report = json.loads((scratch / f"bench-{clients}.json").read_text())
    return {
        "tpot_ms": report["mean_tpot_ms"],
        "throughput": report["output_throughput"],
        "ttft_ms": report["mean_ttft_ms"],
        "others": round(others, 3),
        "lengths": (report["input_lens"], report["output_lens"]),
    }


def predicted(
    plan: Plan, request: Request, profile: ProfileDocument, clients: int, lengths: tuple[list[int], list[int]]
) -> dict[str, float]:
    """The simulator's answer for the same requests in a closed loop."""
    table = api.cost_table(request)
    with calibration.using(profile):
        context = sum(map(sum, lengths)) / len(lengths[0])
        site = sites(plan.pools, table, groups(request), context)[0]
        replica = site.plan
        engine = catalogue.engine(replica.engine)
        rules = Rules.of(
            engine,
            replica.max_num_seqs,
            replica.max_num_batched_tokens,
            asynchronous=site.clock.model.asynchronous,
        )
        server = Server(site.clock, rules, site.kv_blocks, replica.block_size)
        loop = closed_loop(clients, len(lengths[0]), *lengths)
        found = simulate(server, loop).summary()
    return {
        "tpot_ms": found["tpot_ms"]["mean"],
        "throughput": found["output_tok_s"],
        "ttft_ms": found["ttft_ms"]["mean"],
    }


LINE = "{:11} {:>8} {:>10} {:>10} {:>8}  {}"


def compared(
    clients: int, expected: Mapping[str, float], seen: Mapping[str, Any], tries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    error = {name: expected[name] / seen[name] - 1 for name in METRICS}
    steady = f"{100 * seen['others']:.0f} %, {seen['pace']:.2f}"
    for name in METRICS:
        words = (f"{expected[name]:.1f}", f"{seen[name]:.1f}", f"{100 * error[name]:+.1f} %")
        print(LINE.format(name, clients, *words, steady), flush=True)
    kept = (*METRICS, "others", "pace")
    return {
        "concurrency": clients,
        "predicted": dict(expected),
        "measured": {name: seen[name] for name in kept},
        "tries": [{name: one[name] for name in kept} for one in tries],
        "error": error,
    }


def cpu_seconds() -> float:
    """CPU time that all processes of the machine have taken (user, nice, system)."""
    fields = Path("/proc/stat").read_text().split(maxsplit=4)
    return sum(map(int, fields[1:4])) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU time of this process, of its children that ended, and of the sessions that it started."""
    mine = os.getpid()
    total = sum(os.times()[:4])
    parents, times = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        number = int(stat.parent.name)
        parents[number], times[number] = int(fields[1]), (int(fields[11]) + int(fields[12]))
    for number, ticks in times.items():
        above = number
        while above in parents and above != mine:
            above = parents[above]
        if above == mine and number != mine:
            total += ticks / os.sysconf("SC_CLK_TCK")
    return total


def load() -> float:
    """Processes that want a core, over the last minute."""
    return round(os.getloadavg()[0], 2)


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
