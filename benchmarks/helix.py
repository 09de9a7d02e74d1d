"""Layer placement on the two clusters of Helix (ASPLOS 2025): our flow, bound and time beside theirs.

    python benchmarks/helix.py --data DIR [--seconds 60] [--gap 0.001] [--partial]

DIR holds the artefact's cluster files and LLaMA-2-70B's time tables (PLANC_DATA/helix). A machine's tokens/s
with k layers follow their model managers: how many requests its KV blocks hold, the share of a round trip
that they spend on it, and the tables' times of one prompt of 750 tokens and its decode steps. Their own
placements are measured by the same flow first, so that both stand on one scale. Their figures: Gurobi 11 on
20 threads, from the logs of their ablation.
"""

from __future__ import annotations

import argparse
import configparser
import csv
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planc.planner.layer_cluster import Cluster
from planc.planner.layer_flow import COORDINATOR, LayerPlacement, Link, Machine, place_layers

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("helix_published.json").read_text())
LAYERS: int = PUBLISHED["layers"]
_SCALE = {"kbps": 1e3, "mbps": 1e6, "gbps": 1e9, "MilliSec": 1e-3, "Sec": 1.0}


def amount(text: str) -> float:
    """A number with its unit, as the cluster files write them: "12.5 * mbps"."""
    number, unit = text.split("*")
    return float(number) * _SCALE[unit.strip()]


class Rates:
    """Tokens per second of every kind of machine of a cluster, by layers held."""

    def __init__(self, data: Path, counts: dict[str, int]) -> None:
        self.counts = counts
        self.times = {
            (kind, phase): np.loadtxt(
                data / f"llama2_70b_{kind.lower()}_{phase}_bs2time.csv", delimiter=",", unpack=True
            )
            for kind in counts
            for phase in ("prompt", "decode")
        }
        typical = PUBLISHED["typical_layers"]
        room = sum(typical["roomy"][kind] * count for kind, count in counts.items())
        self.typical = typical["tight" if room < typical["tight_below"] * LAYERS else "roomy"]

    def seconds(self, kind: str, phase: str, tokens: int) -> float:
        sizes, milliseconds = self.times[kind, phase]
        return float(np.interp(tokens, sizes, milliseconds)) / 1e3

    def rate(self, kind: str, held: int, layer_rate: dict[str, float]) -> float:
        """Tokens/s with `held` layers; layer_rate: tokens/s of one layer, which sets the round trip."""
        traffic = PUBLISHED["traffic"]
        inputs, outputs = traffic["input_tokens"], traffic["output_tokens"]
        held_by_all = sum(count * self.typical[k] for k, count in self.counts.items())
        mean = sum(count * self.typical[k] / layer_rate[k] for k, count in self.counts.items()) / held_by_all
        mine = held / layer_rate[kind]
        share = mine / ((LAYERS - held) * mean + mine)
        blocks = PUBLISHED["kv_blocks"][kind][held - 1]
        entries = int(traffic["kv_share"] * (traffic["block_tokens"] * blocks * held) / held)
        requests = entries / (inputs + outputs) * share
        prompts = requests / outputs
        prompt_tokens, decode_tokens = round(prompts * inputs), round(requests)
        if prompts > 1:
            prompts, prompt_tokens, decode_tokens = 1.0, inputs, outputs
        total = (prompt_tokens + decode_tokens) / prompts
        prompt = self.seconds(kind, "prompt", int(prompt_tokens / prompts))
        decode = self.seconds(kind, "decode", decode_tokens) / prompts
        return total / (held * (prompt + decode))

    def table(self) -> dict[str, tuple[float, ...]]:
        layer_rate = {kind: PUBLISHED["first_guess"][kind] for kind in self.counts}
        for _ in range(10):
            layer_rate = {
                kind: self.rate(kind, self.typical[kind], layer_rate) * self.typical[kind]
                for kind in self.counts
            }
        nic = PUBLISHED["nic_per_s"] / PUBLISHED["activation_bytes"]
        return {
            kind: tuple(
                min(self.rate(kind, held, layer_rate), nic)
                for held in range(1, len(PUBLISHED["kv_blocks"][kind]) + 1)
            )
            for kind in self.counts
        }


def cluster(data: Path, name: str) -> tuple[list[Machine], list[Link]]:
    """Machines and both directions of every link of a cluster file."""
    file = configparser.ConfigParser()
    with (data / name).open() as lines:
        file.read_file(lines)
    size = int(file["NodeNames"]["total_compute_nodes"])
    kinds = [file[f"ComputeNode-{at}"]["type"] for at in range(size)]
    rates = Rates(data, {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}).table()
    machines = [Machine(f"{kind}-{at}", rates[kind]) for at, kind in enumerate(kinds)]
    links: list[Link] = []
    for section in file.sections():
        if not section.startswith("Link-"):
            continue
        ends = section.split("-")[1:]
        inner = all(end.isdigit() for end in ends)
        source, target = (machines[int(end)].name if end.isdigit() else COORDINATOR for end in ends)
        size_bytes = PUBLISHED["activation_bytes" if inner else "token_bytes"]
        link = Link(
            source,
            target,
            amount(file[section]["bandwidth"]) / size_bytes,
            amount(file[section]["latency"]),
        )
        links.append(link)
        if inner:
            links.append(Link(target, source, link.tokens_s, link.seconds))
    return machines, links


def measured(machines: list[Machine], links: list[Link], ranges: list[list[int]]) -> float:
    """The flow of a published placement."""
    return Cluster(machines, links, LAYERS).flow([(first, last) for first, last in ranges]).tokens_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    home = os.environ.get("PLANC_DATA")
    parser.add_argument(
        "--data", type=Path, default=Path(home) / "helix" if home else None, required=not home
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--gap", type=float, default=0.001, help="stop once this close to the bound")
    parser.add_argument("--partial", action="store_true", help="machines may take over inside their range")
    parser.add_argument("--csv", type=Path, help="also write our placements there")
    options = parser.parse_args()
    rows: list[tuple[str, str, int, int]] = []
    print(f"{'cluster':28} {'links':7} {'tokens/s':>9} {'bound':>10} {'gap':>8} {'seconds':>8}")
    for name in dict.fromkeys(each["cluster"] for each in PUBLISHED["published"]):
        machines, links = cluster(options.data, name)
        for theirs in (each for each in PUBLISHED["published"] if each["cluster"] == name):
            flow = measured(machines, links, theirs["ranges"])
            gap = theirs["bound"] / theirs["tokens_s"] - 1
            print(
                f"{name.removesuffix('.ini'):28} {theirs['links']:7} {theirs['tokens_s']:9.2f} "
                f"{theirs['bound']:10.1f} {gap:8.1%} {theirs['seconds']:8.1f}  "
                f"Helix; measured here {flow:.2f}"
            )
        ours: LayerPlacement = place_layers(
            machines, links, LAYERS, partial=options.partial, time_limit=options.seconds, gap=options.gap
        )
        print(
            f"{'':28} {'all':7} {ours.tokens_s:9.2f} {ours.bound:10.1f} {ours.gap:8.2%} {ours.seconds:8.1f}  "
            f"planc; {ours.latency_s * 1e3:.0f} ms on links"
        )
        rows += [(name, *span) for span in ours.ranges]
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("cluster", "machine", "first_layer", "end_layer"), *rows])


if __name__ == "__main__":
    main()
