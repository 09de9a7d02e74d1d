"""Recorded traffic: three formats, and what a file can have wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from planc.errors import FileMissing, FileUnreadable, UnknownName
from planc.planner.trace import TraceRow, detect, read

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MOONCAKE = '{"timestamp": %s, "input_length": %s, "output_length": %s, "hash_ids": [%s]}\n'
VLLM = '{"request_id": "r", "arrival_time": %s, "input_toks": %s, "output_toks": %s}\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "trace"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("form", "text", "rows"),
    [
        (
            "azure",
            AZURE + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.4799600,3180,8\n",
            [(0.0, 4808, 10), (0.5, 3180, 8)],
        ),
        ("mooncake", MOONCAKE % (0, 600, 9, "3, 4") + "\n" + MOONCAKE % (1500, 5, 7, "5"), None),
        ("vllm", VLLM % (1e9, 20, 3) + VLLM % (1e9 + 2, 30, 4), [(0.0, 20, 3), (2.0, 30, 4)]),
    ],
)
def test_formats(tmp_path: Path, form: str, text: str, rows: list[tuple[float, int, int]] | None) -> None:
    file = written(tmp_path, text)
    assert detect(file) == form
    found = list(read(file, form))
    if rows is None:
        assert found == [TraceRow(0.0, 600, 9, (3, 4)), TraceRow(1.5, 5, 7, (5,))]
    else:
        assert [row[:3] for row in found] == [pytest.approx(row) for row in rows]
    assert list(read(file, form, limit=1)) == found[:1]


@pytest.mark.parametrize(
    ("form", "text", "says"),
    [
        ("azure", "", "no requests"),
        ("azure", AZURE, "no requests"),
        ("mooncake", "\n", "no requests"),
        ("azure", "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,5\n", "row 2: there is no GeneratedTokens"),
        ("azure", AZURE + "2023-11-16 18:17:03,5\n", "row 2: there is no GeneratedTokens"),
        ("azure", AZURE + "yesterday,5,5\n", "row 2: TIMESTAMP = 'yesterday' is not a time"),
        ("mooncake", MOONCAKE % (9, 1, 1, "") + MOONCAKE % (8, 1, 1, ""), "row 2: .* earlier than .* row 1"),
        ("mooncake", MOONCAKE % (-1, 1, 1, ""), "row 1: timestamp = -1 is negative"),
        ("mooncake", MOONCAKE % (0, 1, 0, ""), "row 1: output_length = 0: .* at least one token"),
        ("mooncake", MOONCAKE % (0, -4, 1, ""), "row 1: input_length = -4"),
        ("mooncake", MOONCAKE % (0, 1.5, 1, ""), "row 1: input_length = 1.5 is not a number of tokens"),
        ("mooncake", MOONCAKE % (0, 1, 1, '"a"'), "row 1: hash_ids is not a list of whole numbers"),
        ("vllm", VLLM % ("NaN", 1, 1), "row 1: arrival_time = nan is not a time"),
        ("vllm", "[1]\n", "row 1: not a JSON object"),
        ("vllm", "{\n", "row 1: not JSON"),
        ("vllm", MOONCAKE % (0, 1, 1, ""), "row 1: there is no arrival_time; found timestamp"),
    ],
)
def test_what_can_be_wrong(tmp_path: Path, form: str, text: str, says: str) -> None:
    with pytest.raises(FileUnreadable, match=says):
        list(read(written(tmp_path, text), form))


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        list(read(tmp_path / "none", "vllm"))
    with pytest.raises(FileMissing):
        detect(tmp_path / "none")
    with pytest.raises(UnknownName, match="mooncake, azure, vllm"):
        read(tmp_path / "none", "csv")
    for text, says in (("", "empty"), ("a,b\n1,2\n", "no known format")):
        with pytest.raises(FileUnreadable, match=says):
            detect(written(tmp_path, text))
    (tmp_path / "binary").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(FileUnreadable, match="UTF-8"):
        detect(tmp_path / "binary")


@pytest.mark.skipif("PLANC_DATA" not in os.environ, reason="needs the recorded traces (PLANC_DATA)")
@pytest.mark.parametrize(
    ("name", "form", "count", "span"),
    [
        ("AzureLLMInferenceTrace_conv.csv", "azure", 19_366, 3501.7),
        ("AzureLLMInferenceTrace_code.csv", "azure", 8_819, 3435.9),
        ("mooncake_conversation_trace.jsonl", "mooncake", 12_031, 3537.0),
    ],
)
def test_recorded(name: str, form: str, count: int, span: float) -> None:
    file = Path(os.environ["PLANC_DATA"]) / "traces" / name
    assert detect(file) == form
    rows = list(read(file, form))
    assert len(rows) == count
    assert rows[-1].arrival_s == pytest.approx(span, abs=0.1)
