"""`planc validate` and `planc calibrate --points`, as a user types them."""

from __future__ import annotations

import csv
from pathlib import Path

from tests.roof.support import ROOT, Planc

HEADER = "id,model,gpu,engine,weights,mode,isl,osl,concurrency,tp,gpus,ttft_ms,tpot_ms"
ROWS = [
    f"p{c}-{isl},qwen3-0.6b,h100_sxm,vllm,bf16,agg,{isl},1024,{c},1,1,{20 + c},{1.4 + 0.02 * c}"
    for isl in (1024, 8192)
    for c in (4, 8, 16)
]
BAD = [
    "neg,qwen3-0.6b,h100_sxm,vllm,bf16,agg,512,128,4,1,1,-5,2",
    "gpus,qwen3-0.6b,h100_sxm,vllm,bf16,agg,512,128,4,2,1,5,2",
    "model,unheard-of,h100_sxm,vllm,bf16,agg,512,128,4,1,1,5,2",
    "gpu,qwen3-0.6b,abacus,vllm,bf16,agg,512,128,4,1,1,5,2",
    "format,qwen3-0.6b,h100_sxm,vllm,nvfp4,agg,512,128,4,1,1,5,2",
]
MODELS = ROOT / "examples" / "models"


def write(folder: Path, rows: list[str]) -> Path:
    path = folder / "points.csv"
    path.write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    return path


def test_every_row_is_predicted_or_counted(planc: Planc, tmp_path: Path) -> None:
    points = write(tmp_path, [*ROWS, *BAD])
    out = tmp_path / "predictions.csv"
    done = planc("validate", points, "--by", "gpu,engine", "--models", MODELS, "--out", out, "--json")
    assert done.code == 0, done.err
    body = done.json()
    assert (body["n"], body["n_unpredicted"], body["blind"]) == (6, 5, False)
    reasons = {item["id"]: item["reason"] for item in body["unpredicted"]}
    assert set(reasons) == {"neg", "gpus", "model", "gpu", "format"}
    assert "not above 0" in reasons["neg"]
    assert "no kernels for nvfp4" in reasons["format"]
    groups = {(g["gpu"], g["engine"]): (g["n"], g["n_unpredicted"]) for g in body["groups"]}
    assert groups == {("h100_sxm", "vllm"): (6, 4), ("abacus", "vllm"): (0, 1)}
    for metric in ("tpot", "ttft", "throughput"):
        assert body[f"{metric}_mape"] > 0
        assert body[f"{metric}_n"] == 6
    with out.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 11
    first = lines[0]
    assert float(first["tpot_ms_low"]) < float(first["tpot_ms"]) < float(first["tpot_ms_high"])
    assert float(first["ttft_steady_ms"]) < float(first["ttft_ms"])  # a start burst adds to the mean


def test_flags_change_what_is_predicted(planc: Planc, tmp_path: Path) -> None:
    points = write(tmp_path, ROWS[:3])
    plain = planc("validate", points, "--models", MODELS, "--json").json()
    late = planc("validate", points, "--models", MODELS, "--set", "stream_interval=20", "--json").json()
    assert late["ttft_bias"] > plain["ttft_bias"] + 20
    wrong = planc("validate", points, "--set", "speed=2")
    assert wrong.code == 2
    assert "speed" in wrong.err


def test_a_table_for_the_terminal(planc: Planc, tmp_path: Path) -> None:
    shown = planc("validate", write(tmp_path, ROWS[:3]), "--models", MODELS)
    assert shown.code == 0
    assert "rows that pass lint" in shown.out


def test_files_that_are_no_points(planc: Planc, tmp_path: Path) -> None:
    assert planc("validate", tmp_path / "absent.csv").code == 2
    empty = tmp_path / "empty.csv"
    empty.write_text("", encoding="utf-8")
    assert planc("validate", empty).code == 2
    strange = tmp_path / "strange.csv"
    strange.write_text("model,colour\n", encoding="utf-8")
    done = planc("validate", strange)
    assert done.code == 2
    assert "colour" in done.err
    assert planc("validate", write(tmp_path, ROWS), "--by", "colour").code == 2


def test_constants_from_points_bring_predictions_nearer(planc: Planc, tmp_path: Path) -> None:
    points = write(tmp_path, ROWS)
    before = planc("validate", points, "--models", MODELS, "--json").json()
    profile = tmp_path / "profile.json"
    done = planc("calibrate", "--points", points, "-o", profile)
    assert done.code == 0, done.err
    after = planc("validate", points, "--models", MODELS, "--profile", profile, "--json").json()
    assert after["tpot_mape"] < before["tpot_mape"]
    assert after["ttft_mape"] < before["ttft_mape"]
    several = write(tmp_path, [*ROWS, ROWS[0].replace("h100_sxm", "h200_sxm")])
    refused = planc("calibrate", "--points", several, "-o", tmp_path / "other.json")
    assert refused.code == 2
    assert not (tmp_path / "other.json").exists()
