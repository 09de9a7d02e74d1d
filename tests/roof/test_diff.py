"""`planc diff` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.roof.support import Planc, write_request


@pytest.fixture(scope="module")
def busier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for three times the traffic of `bundle`."""
    from planc import api

    folder = tmp_path_factory.mktemp("busier")
    request = write_request(folder, workload={"isl": 500, "osl": 100, "request_rate": 6})
    api.write_bundle(api.compile(request), folder / "b")
    return folder / "b"


def test_a_bundle_and_itself(planc: Planc, bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = planc("diff", bundle, bundle / "plan.json", "--html", page)
    assert result.code == 0
    assert result.out.strip() == "the plans do not differ"
    assert "do not differ" in page.read_text(encoding="utf-8")


def test_what_changed_and_why(planc: Planc, bundle: Path, busier: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = planc("diff", bundle, busier, "--html", page)
    assert result.code == 1, result.err
    assert "~ request.workload.request_rate: 2 -> 6  (+200 %)" in result.out
    rows = {line.split("  ")[0].strip(): line for line in result.out.splitlines()}
    assert "+400" in next(line for name, line in rows.items() if name.startswith("workload request_rate"))
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_machine_output_adds_up(planc: Planc, bundle: Path, busier: Path) -> None:
    there, back = (planc("diff", *pair, "--json") for pair in ((bundle, busier), (busier, bundle)))
    assert there.code == back.code == 1
    body, other = there.json()["attribution"], back.json()["attribution"]
    for name, metric in body["metrics"].items():
        assert sum(part["changes"][name] for part in body["parts"]) == metric["new"] - metric["old"]
        assert other["metrics"][name]["change"] == -metric["change"]
    assert [part["name"] for part in body["parts"]] == [part["name"] for part in other["parts"]]
    assert body["walks"]["from_old"] == other["walks"]["from_new"]


def test_only_what_changed(planc: Planc, bundle: Path, busier: Path) -> None:
    result = planc("diff", bundle, busier, "--no-attribution", "--json")
    assert result.code == 1
    assert result.json()["attribution"] is None
    assert result.json()["unattributed"] == "it was not asked for"
    assert planc("diff", bundle, busier, "--no-attribution", "--all").code == 1


def test_a_plan_without_its_model(planc: Planc, bundle: Path, busier: Path, tmp_path: Path) -> None:
    """Away from their bundles plans still compare; the model is looked for where the request had it."""
    files = []
    for number, folder in enumerate((bundle, busier)):
        body = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        body["model"]["source"] = "gone/config.json"
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(body), encoding="utf-8")
    result = planc("diff", *files)
    assert result.code == 1
    assert "no attribution: model: there is no file or folder at 'gone/config.json'" in result.out


def test_code_named_by_a_plan_is_not_run(planc: Planc, bundle: Path, busier: Path, tmp_path: Path) -> None:
    files = []
    for number, folder in enumerate((bundle, busier)):
        body = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        body["model"]["source"] = "no_such_package.models:make"
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(body), encoding="utf-8")
    result = planc("diff", *files)
    assert result.code == 1
    assert "is code" in result.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere", "nowhere"), "nowhere"),
        (("{bundle}", "{text}"), "not JSON"),
        (("{bundle}", "{busier}", "--html", "{bundle}"), "--html"),
        (("{bundle}", "{busier}", "--html", "no/such/folder/page.html"), "--html"),
    ],
)
def test_bad_input(
    words: tuple[str, ...], told: str, planc: Planc, bundle: Path, busier: Path, tmp_path: Path
) -> None:
    text = tmp_path / "plan.json"
    text.write_text("{", encoding="utf-8")
    result = planc("diff", *(word.format(bundle=bundle, busier=busier, text=text) for word in words))
    assert result.code == 2
    assert told in result.err
