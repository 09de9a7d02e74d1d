"""Layer placement: against all placements of small clusters, its bound, and what cannot be placed."""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from pathlib import Path

import pytest

from planc.errors import Infeasible, InvalidField
from planc.planner.layer_bound import upper_bound
from planc.planner.layer_cluster import COORDINATOR, Cluster, Link, Machine, Range
from planc.planner.layer_flow import place_layers


def drawn(seed: int) -> tuple[list[Machine], list[Link], int]:
    """Two or three machines of at most two kinds, some links missing or narrow, two to four layers."""
    rng = random.Random(seed)
    layers = rng.randint(2, 4)
    kinds = [tuple(rng.randint(60, 140) / k for k in range(1, rng.randint(1, layers) + 1)) for _ in range(2)]
    machines = [Machine(f"m{at}", rng.choice(kinds)) for at in range(rng.randint(2, 3))]
    links = []
    for a, b in itertools.permutations([*(machine.name for machine in machines), COORDINATOR], 2):
        if rng.random() < 0.85:
            links.append(Link(a, b, rng.choice([5.0, 20.0, 40.0, 1e4]), rng.random() / 100))
    return machines, links, layers


def best_flow(cluster: Cluster, partial: bool) -> float:
    """The largest flow of all placements."""
    spans: list[list[Range]] = [
        [None]
        + [(s, s + k) for k in range(1, len(machine.tokens_s) + 1) for s in range(cluster.layers - k + 1)]
        for machine in cluster.machines
    ]
    return max(cluster.flow(ranges, partial).tokens_s for ranges in itertools.product(*spans))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_equals_brute_force_on_small_clusters(seed: int, partial: bool) -> None:
    machines, links, layers = drawn(seed)
    cluster = Cluster(machines, links, layers)
    best = best_flow(cluster, partial)
    if best == 0:
        with pytest.raises(Infeasible):
            place_layers(machines, links, layers, partial=partial, gap=1e-6)
        return
    found = place_layers(machines, links, layers, partial=partial, gap=1e-6)
    assert found.tokens_s == pytest.approx(best, rel=1e-4)
    assert found.bound >= best * (1 - 1e-9)
    assert found.status == "optimal"
    assert upper_bound(cluster, time.monotonic() + 20) >= best * (1 - 1e-9)


def full_mesh(machines: list[Machine], tokens_s: float, seconds: float = 0.0) -> list[Link]:
    names = [*(machine.name for machine in machines), COORDINATOR]
    return [Link(a, b, tokens_s, seconds) for a, b in itertools.permutations(names, 2)]


def test_twelve_alike_machines_share_the_layers_evenly() -> None:
    """Rate 120 / k: any even split passes 12 * 120 / 24 tokens/s, and nothing passes more."""
    machines = [Machine(f"m{at}", tuple(120 / k for k in range(1, 9))) for at in range(12)]
    found = place_layers(machines, full_mesh(machines, 1e6, 0.001), 24)
    assert found.tokens_s == pytest.approx(60.0, rel=1e-4)
    assert found.gap <= 1e-3
    assert found.latency_s > 0


def test_what_it_returns_is_a_placement_that_carries_its_flow() -> None:
    machines = [Machine(f"big{at}", tuple(300 / k for k in range(1, 9))) for at in range(3)]
    machines += [Machine(f"small{at}", tuple(90 / k for k in range(1, 4))) for at in range(7)]
    links = full_mesh(machines, 1e6)
    found = place_layers(machines, links, 20)
    rates = {machine.name: machine.tokens_s for machine in machines}
    spans = {name: (first, last) for name, first, last in found.ranges}
    for name, (first, last) in spans.items():
        assert 0 <= first < last <= 20
        assert last - first <= len(rates[name])
        into = sum(rate for _, target, rate in found.links if target == name)
        out = sum(rate for source, _, rate in found.links if source == name)
        assert into == pytest.approx(out)
        assert into <= rates[name][last - first - 1] * (1 + 1e-9)
    for source, target, _ in found.links:
        handed = spans[source][1] if source != COORDINATOR else 0
        assert handed == (spans[target][0] if target != COORDINATOR else 20)
    assert sum(rate for source, _, rate in found.links if source == COORDINATOR) == pytest.approx(
        found.tokens_s
    )
    assert found.ranges == place_layers(machines, links, 20).ranges


def test_narrow_links_between_sites_are_crossed_by_several_machines() -> None:
    """West holds four of five layers at 100 tokens/s; one link carries 40, so three hold the fifth."""
    west = [Machine(f"west{at}", (100.0, 100.0)) for at in range(2)]
    east = [Machine(f"east{at}", (100.0, 50.0)) for at in range(3)]
    machines = [*west, *east]
    links = [
        Link(a.name, b.name, 1e6 if (a in west) == (b in west) else 40.0)
        for a, b in itertools.permutations(machines, 2)
    ]
    links += [Link(COORDINATOR, machine.name, 1e6) for machine in machines]
    links += [Link(machine.name, COORDINATOR, 1e6) for machine in machines]
    found = place_layers(machines, links, 5)
    assert found.tokens_s == pytest.approx(100.0)


@pytest.mark.parametrize("seed", range(2))
def test_clusters_of_unlike_links_get_a_placement_below_its_bound(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [tuple(rng.uniform(500, 4000) / k for k in range(1, rng.randint(4, 7))) for _ in range(3)]
    machines = [Machine(f"m{at}", rng.choice(kinds)) for at in range(8)]
    names = [*(machine.name for machine in machines), COORDINATOR]
    links = [Link(a, b, rng.choice([50.0, 200.0, 1e5])) for a, b in itertools.permutations(names, 2)]
    found = place_layers(machines, links, 16, gap=0.3, time_limit=2)
    assert 0 < found.tokens_s <= found.bound


def test_no_time_still_gives_a_placement_and_an_honest_gap() -> None:
    machines = [Machine(f"m{at}", tuple(100 / k for k in range(1, 6))) for at in range(30)]
    found = place_layers(machines, full_mesh(machines, 1e6), 40, time_limit=1e-3)
    assert found.status == "feasible"
    assert 0 < found.tokens_s < found.bound
    assert found.gap > 0


@pytest.mark.parametrize(
    ("machines", "links", "layers", "error", "word"),
    [
        ([], [], 4, InvalidField, "machine"),
        ([Machine("a", (1.0,))], [], 0, InvalidField, "layers"),
        ([Machine("a", (1.0,)), Machine("a", (1.0,))], [], 1, InvalidField, "name"),
        ([Machine("a", (1.0,))], [Link("a", "b", 1.0)], 1, InvalidField, "'b'"),
        ([Machine("a", (1.0,))], [Link("a", COORDINATOR, -1.0)], 1, InvalidField, "negative"),
        ([Machine("a", (float("nan"),))], [], 1, InvalidField, "finite"),
        ([Machine("a", (1.0, 1.0))], [], 3, Infeasible, "hold 2 layers"),
        ([Machine("a", (1.0,))], [], 1, Infeasible, "links"),
    ],
)
def test_impossible_clusters_are_refused_in_words(
    machines: list[Machine], links: list[Link], layers: int, error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        place_layers(machines, links, layers)


def test_helix_scale_is_theirs() -> None:
    """Published placements, measured by our flow, carry what their logs say."""
    home = os.environ.get("PLANC_DATA")
    if not home:
        pytest.skip("PLANC_DATA is not set: Helix's cluster files lie outside the repository")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from benchmarks.helix import PUBLISHED, cluster, measured

    for theirs in PUBLISHED["published"]:
        machines, links = cluster(Path(home) / "helix", theirs["cluster"])
        assert measured(machines, links, theirs["ranges"]) == pytest.approx(theirs["tokens_s"], rel=1e-6)
