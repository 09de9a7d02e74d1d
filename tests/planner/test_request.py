"""Every mistake in a request gives one message that names the field, the value and the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from planc.errors import FileMissing, FileUnreadable, InvalidField, PlancError, UnknownField, UnknownName
from planc.planner.joint import is_joint
from planc.planner.request import Request, load_request, make_request
from planc.planner.yaml_text import parsed_yaml
from tests.planner.cases import raw

EXAMPLES = [
    p for p in sorted((Path(__file__).parents[2] / "examples/requests").glob("*.yaml")) if not is_joint(p)
]

#: (override, error class, words that the message must hold)
MISTAKES: list[tuple[str, type[PlancError], tuple[str, ...]]] = [
    ("slo.ttft_p99_s=2", UnknownField, ("slo.ttft_p99_s", "milliseconds", "ttft_p99_ms")),
    ("slo.ttft_ms=2", UnknownField, ("slo.ttft_ms", "ttft_mean_ms")),
    ("slo.tpot_p100_ms=2", UnknownField, ("slo.tpot_p100_ms", "percentile")),
    ("slo.tpot_p0_ms=2", UnknownField, ("slo.tpot_p0_ms",)),
    ("slo.tpot_mean_ms=0", InvalidField, ("slo.tpot_mean_ms", "= 0", "above 0")),
    ("slo.tpot_mean_ms=-3", InvalidField, ("slo.tpot_mean_ms", "-3")),
    ("slo.tpot_mean_ms=soon", InvalidField, ("slo.tpot_mean_ms", "'soon'")),
    ("slo=[1]", InvalidField, ("slo", "mapping")),
    ("inventory.nodes[0].gpus_per_node=-8", InvalidField, ("inventory.nodes[0].gpus_per_node", "-8")),
    ("inventory.nodes[0].gpus_per_node=0", InvalidField, ("gpus_per_node", "at least 1")),
    ("inventory.nodes[0].count=-1", InvalidField, ("inventory.nodes[0].count", "-1")),
    ("inventory.nodes[0].count=2.5", InvalidField, ("count", "2.5", "whole")),
    ("inventory.nodes[0].gpu=h200sxm", UnknownName, ("inventory.nodes[0].gpu", "h200sxm", "h200_sxm")),
    ("inventory.nodes[0].usd_per_gpu_hour=-1", InvalidField, ("usd_per_gpu_hour", "-1")),
    ("inventory.nodes[0].usd_per_hour=1", UnknownField, ("usd_per_hour", "usd_per_gpu_hour")),
    ("inventory.nodes[0].name=a b", InvalidField, ("name", "a b")),
    ("inventory.nodes=[]", InvalidField, ("inventory.nodes", "empty")),
    ("inventory.nodes={gpu: l4}", InvalidField, ("inventory.nodes", "list")),
    ("inventory.inter_node_gbps=0", InvalidField, ("inter_node_gbps", "above 0")),
    ("inventory.inter_node_gb=10", UnknownField, ("inter_node_gb", "inter_node_gbps")),
    ("objective=mincost", InvalidField, ("objective", "mincost", "min_cost")),
    ("constraints.weights=fp7", UnknownName, ("constraints.weights", "fp7", "fp8")),
    ("constraints.weights=[mxfp8]", InvalidField, ("constraints.weights", "mxfp8", "no weight format")),
    ("constraints.kv=w4a16", InvalidField, ("constraints.kv", "w4a16")),
    ("constraints.engines=[vlm]", UnknownName, ("constraints.engines", "vlm", "vllm")),
    ("constraints.gpus=[h300]", UnknownName, ("constraints.gpus", "h300")),
    ("constraints.tp=0", InvalidField, ("constraints.tp[0]", "at least 1")),
    ("constraints.max_gpus=0", InvalidField, ("constraints.max_gpus", "at least 1")),
    ("constraints.max_accuracy_drop=5", InvalidField, ("max_accuracy_drop", "at most 1")),
    ("constraints.max_gpu=4", UnknownField, ("constraints.max_gpu", "max_gpus")),
    ("constraints.gpu_memory_utilization=1.5", InvalidField, ("gpu_memory_utilization",)),
    ("workload.isl=-4", InvalidField, ("workload.isl", "-4")),
    ("workload.isl=many", InvalidField, ("workload.isl", "many", "tokens")),
    ("workload.isl=true", InvalidField, ("workload.isl",)),
    ("workload.isl={mean: 100, q50: 80}", UnknownField, ("workload.isl.q50",)),
    ("workload.isl={p50: 300, p95: 100}", InvalidField, ("workload.isl", "ascend")),
    ("workload.isl={histogram: a.csv, mean: 3}", InvalidField, ("workload.isl", "stands alone")),
    ("workload.rate=max", InvalidField, ("request_rate and rate", "exactly one")),
    ("workload.concurency=5", UnknownField, ("workload.concurency", "concurrency")),
    ("workload.request_rate=0", InvalidField, ("workload.request_rate", "above 0")),
    ("workload.request_rate=.nan", InvalidField, ("workload.request_rate", "finite")),
    ("workload.request_rate=20/s", InvalidField, ("workload.request_rate", "20/s", "unit")),
    ("workload.prefix_hit_rate=1", InvalidField, ("workload.prefix_hit_rate", "below 1")),
    ("workload=[{isl: 1, osl: 2, weight: 0.5}, {isl: 1, osl: 2}]", InvalidField, ("workload", "no rate")),
    ("workload=[{isl: 1, osl: 2, weight: 0}]", InvalidField, ("workload[0].weight",)),
    ("workload=[{isl: 1, osl: 2, request_rate: 1}, {isl: 1, osl: 2}]", InvalidField, ("every class",)),
    ("workload={trace: t.jsonl, format: other}", InvalidField, ("workload.trace.format", "mooncake")),
    ("workload={isl:4000, osl: 1}", UnknownField, ("isl:4000", "space after the colon")),
    ("workload=3", InvalidField, ("workload", "mapping")),
    ("request_rate=5", UnknownField, ("request_rate", "under 'workload'")),
    ("modle=x", UnknownField, ("modle", "model")),
    ("model=", InvalidField, ("model",)),
    ("model=3", InvalidField, ("model", "name")),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "request.yaml"
    place.write_text(yaml.safe_dump(raw()))
    return place


@pytest.mark.parametrize(("override", "kind", "words"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_each_mistake_names_field_value_and_mend(
    file: Path, override: str, kind: type[PlancError], words: tuple[str, ...]
) -> None:
    with pytest.raises(PlancError) as caught:
        load_request(file, [override])
    assert type(caught.value) is kind, str(caught.value)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert all(word in message for word in words), message
    assert message.rstrip().endswith((".", "?")), message
    assert "pydantic" not in message
    assert len(message) < 500


def test_missing_fields_are_named(file: Path) -> None:
    for key in ("model", "inventory", "workload"):
        body = raw()
        del body[key]
        with pytest.raises(InvalidField, match=f"{key} = None: missing"):
            make_request(body)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "nothing"),
        ("- a\n- b\n", "a list"),
        ("model: [", "expected"),
        ("model: a\nmodel: b\n", "written twice"),
        ("model: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_request(tmp_path: Path, text: str, reason: str) -> None:
    place = tmp_path / "r.yaml"
    place.write_text(text)
    with pytest.raises(FileUnreadable, match=reason):
        load_request(place)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match=r"nothing\.yaml"):
        load_request(tmp_path / "nothing.yaml")
    with pytest.raises(FileMissing, match="request"):
        load_request(tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=[p.stem for p in EXAMPLES])
def test_examples_load_and_round_trip(path: Path) -> None:
    request = load_request(path)
    again = make_request(request.dump())
    assert again.dump() == request.dump()
    assert again.fingerprint() == request.fingerprint()


@pytest.mark.parametrize(
    "workload",
    [
        {"isl": 10, "osl": 5, "concurrency": 4},
        {"isl": 10, "osl": 5, "request_rate": "max"},
        {"isl": {"mean": 100, "p50": 80, "p95": 300}, "osl": 5, "rate": "max", "prefix_hit_rate": 0.25},
        [{"isl": 10, "osl": 5, "request_rate": 1, "name": "chat"}, {"isl": 99, "osl": 5, "request_rate": 2}],
        {"classes": [{"isl": 10, "osl": 5, "weight": 3}, {"isl": 20, "osl": 5}], "request_rate": 4},
        {"trace": "t.jsonl", "format": "mooncake", "prefix_hit_rate": 0.5},
    ],
)
def test_workload_forms_round_trip(workload: Any) -> None:
    request = make_request(raw(workload=workload))
    assert make_request(request.dump()).dump() == request.dump()


def test_short_and_long_forms_mean_the_same() -> None:
    one = make_request(raw(workload={"isl": 10, "osl": 5, "rate": "max"}, constraints={"tp": 2}))
    other = make_request(
        raw(workload={"classes": [{"isl": {"mean": 10}, "osl": 5.0}], "rate": "max"}, constraints={"tp": [2]})
    )
    assert one.dump() == other.dump()


def test_overrides_reach_lists_and_make_parents(file: Path) -> None:
    request = load_request(
        file, ["inventory.nodes[0].count=3", "constraints.max_gpus=7", "slo={tpot_p90_ms: 9}"]
    )
    assert request.inventory.nodes[0].count == 3
    assert request.constraints.max_gpus == 7
    assert request.slo == {"tpot_p90_ms": 9}
    assert load_request(file, {"workload.request_rate": 9}).workload.request_rate == 9


@pytest.mark.parametrize("override", ["inventory.nodes[4].count=3", "model.x=1", "tp", "=3"])
def test_overrides_that_lead_nowhere(file: Path, override: str) -> None:
    with pytest.raises(PlancError) as caught:
        load_request(file, [override])
    assert caught.value.exit_code == 2


def test_paths_are_relative_to_the_request_file(file: Path) -> None:
    request = load_request(file)
    assert request.model_path() == file.parent / "llama-3.1-8b.json"
    assert load_request(file, ["model=my.models:make"]).model_path() == "my.models:make"


def test_the_fingerprint_follows_the_content_of_named_files(file: Path) -> None:
    (file.parent / "h.csv").write_text("10,1\n20,1\n")
    request = load_request(file, ["workload.isl={histogram: h.csv}"])
    before = request.fingerprint()
    (file.parent / "h.csv").write_text("10,1\n20,2\n")
    assert request.fingerprint() != before
    (file.parent / "h.csv").unlink()
    with pytest.raises(FileMissing, match=r"h\.csv"):
        request.fingerprint()


def test_objectives_are_in_seconds_and_ordered() -> None:
    request: Request = make_request(raw(slo={"tpot_mean_ms": 30, "ttft_p99.9_ms": 2000}))
    assert [(s.metric, s.quantile, s.limit) for s in request.slos()] == [
        ("tpot", None, 0.03),
        ("ttft", pytest.approx(0.999), 2.0),
    ]


@pytest.mark.parametrize(
    ("text", "value"), [("1e9", 1e9), ("2.5E-3", 2.5e-3), ("-1e+2", -100.0), ("1e5x", "1e5x")]
)
def test_numbers_with_an_exponent_are_numbers(text: str, value: object) -> None:
    assert parsed_yaml(text) == value
    assert parsed_yaml(f"a: [{text}, 12, 0x10, e2]") == {"a": [value, 12, 16, "e2"]}
