"""Measured points: what a file may say, and what is said of rows that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planc.errors import FileMissing, FileUnreadable, InvalidField, UnknownField
from planc.runtime.validation.harness import harness
from planc.runtime.validation.points import Point, PoolLabel, read_points

HEADER = (
    "id,model,gpu,engine,weights,mode,isl,osl,concurrency,"
    "tp,pp,attention_dp,moe_tp,moe_ep,gpus,ttft_ms,tpot_ms"
)
GOOD = "a,llama-3.1-8b,h200_sxm,vllm,fp8,agg,1024,1024,16,2,1,1,1,1,2,50,8"


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "points.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def one(folder: Path, row: str, header: str = HEADER) -> Point:
    points, rejected = read_points(write(folder, row, header=header))
    assert not rejected, rejected
    return points[0]


def test_a_row_becomes_a_point(tmp_path: Path) -> None:
    point = one(tmp_path, GOOD)
    assert (point.cell, point.workload) == (("llama-3.1-8b", "h200_sxm", "vllm", "fp8"), (1024, 1024))
    assert (point.tp, point.gpus, point.ttft_ms, point.tpot_ms) == (2, 2, 50.0, 8.0)


def test_empty_cells_take_the_usual_value(tmp_path: Path) -> None:
    point = one(tmp_path, "a,llama-3.1-8b,h200_sxm,vllm,fp8,,1024,1024,16,,,,,,,,")
    assert (point.mode, point.tp, point.gpus, point.ttft_ms) == ("agg", 1, 1, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ttft_ms": "-1"}, "ttft_ms = -1 is not above 0"),
        ({"tpot_ms": "nan"}, "tpot_ms = 'nan' is not a number"),
        ({"gpus": "4"}, "gpus = 4, and tp x pp x attention_dp is 2"),
        ({"isl": "0"}, "isl = 0 is not a whole number above 0"),
        ({"concurrency": ""}, "concurrency is empty"),
        ({"mode": "both"}, "neither agg nor disagg"),
        ({"mode": "disagg"}, "no prefill_ column"),
    ],
)
def test_impossible_rows_are_kept_with_their_reason(
    tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    cells = dict(zip(HEADER.split(","), GOOD.split(","), strict=True)) | change
    points, rejected = read_points(write(tmp_path, GOOD, ",".join(cells.values())))
    assert len(points) == 1
    assert [(item.row, reason in item.reason) for item in rejected] == [(2, True)], rejected
    assert rejected[0].labels(["model", "tp"]) == ("llama-3.1-8b", "2")


def test_a_row_of_another_length_is_rejected(tmp_path: Path) -> None:
    _, rejected = read_points(write(tmp_path, GOOD + ",7", "a,b"))
    assert ["cells" in item.reason for item in rejected] == [True, True]


def test_squared_expert_degrees_are_put_right(tmp_path: Path) -> None:
    row = "a,deepseek-r1,h200_sxm,trtllm,fp8,agg,1024,1024,16,64,1,1,8,8,64,50,8"
    point = one(tmp_path, row)
    assert (point.tp, point.moe_tp, point.moe_ep, point.gpus) == (8, 1, 8, 8)
    assert "count one group twice" in point.repairs[0]


def test_wide_groups_that_say_so_are_left_alone(tmp_path: Path) -> None:
    row = "a,deepseek-r1,h200_sxm,trtllm,fp8,agg,1024,1024,16,16,1,1,1,16,16,50,8"
    point = one(tmp_path, row)
    assert (point.tp, point.moe_ep, point.repairs) == (16, 16, ())


def test_files_that_are_no_points(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        read_points(tmp_path / "absent.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(FileUnreadable, match="empty"):
        read_points(empty)
    with pytest.raises(FileUnreadable, match="no rows"):
        read_points(write(tmp_path))
    with pytest.raises(UnknownField, match="batch"):
        read_points(write(tmp_path, GOOD + ",1", header=HEADER + ",batch"))
    with pytest.raises(InvalidField, match="missing"):
        read_points(write(tmp_path, "a,b", header="id,model"))


def test_flags_come_from_rules_then_the_file_then_options(tmp_path: Path) -> None:
    header = HEADER + ",requests_per_client,burst"
    plain = one(tmp_path, GOOD + ",,", header)
    assert (harness(plain).requests_per_client, harness(plain).length_low, harness(plain).kv) == (
        10,
        0.8,
        "bf16",
    )
    stated = one(tmp_path, GOOD + ",5,false", header)
    assert (harness(stated).requests_per_client, harness(stated).burst) == (5.0, False)
    assert harness(stated, {"requests_per_client": 3.0}).requests_per_client == 3.0
    assert harness(plain, rules=False).kv is None
    with pytest.raises(UnknownField):
        harness(plain, {"speed": 1})
    with pytest.raises(InvalidField, match="length_low"):
        harness(plain, {"length_low": 2.0})


def test_lengths_of_another_load_generator_are_fixed(tmp_path: Path) -> None:
    point = one(tmp_path, GOOD.replace("1024,1024", "4000,500"))
    assert harness(point).length_low == 1.0


def test_early_generated_settings_have_no_overlap(tmp_path: Path) -> None:
    other = GOOD.replace("1024,1024", "4000,500").replace("vllm", "trtllm")
    flags = {
        version: harness(replace(one(tmp_path, other), engine_version=version))
        for version in ("1.0.0rc3", "1.2")
    }
    assert (flags["1.0.0rc3"].asynchronous, flags["1.2"].asynchronous) == (False, None)
    assert flags["1.2"].keeps_connections
    assert not harness(one(tmp_path, GOOD)).keeps_connections


def test_pools_are_laid_out_by_their_recipes(tmp_path: Path) -> None:
    """One TensorRT-LLM layout under two labels of its prefill pool; other models are left alone."""
    point = replace(
        one(tmp_path, GOOD),
        model="deepseek-r1", gpu="h200_sxm", engine="trtllm", weights="fp8", mode="disagg", isl=8192,
        prefill=PoolLabel(1, 1, 8, 8), decode=PoolLabel(1, 1, 8, 8),
    )  # fmt: skip
    known = harness(point)
    assert (known.prompt_dp, known.max_num_batched_tokens, known.asynchronous) == (1, 16640, False)
    assert harness(replace(point, isl=1024)).prompt_dp == 8
    assert harness(replace(point, model="qwen3-235b")).prompt_dp is None
    assert harness(point, rules=False).prompt_dp is None
    blackwell = replace(point, gpu="b200_sxm")
    assert (harness(blackwell).dependent_launch, harness(blackwell).expert_table) == (
        False,
        "sglang/fp8_block",
    )
    whole = replace(blackwell, weights="nvfp4", decode=PoolLabel(1, 8, 1, 8))
    assert (harness(whole).dependent_launch, harness(whole).expert_table) == (True, None)
