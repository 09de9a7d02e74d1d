"""Recorded traffic, row by row: when each request came, how long it was, which prefix blocks it names.

Files are read as they stream by, so a trace may be longer than memory. Nothing is dropped: the first row
that cannot be read is an error that names its line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from planc.errors import FileMissing, FileUnreadable, UnknownName

#: tokens of one prefix block of a Mooncake trace
MOONCAKE_BLOCK = 512


class TraceRow(NamedTuple):
    """One request. `arrival_s` counts from the trace's first; `blocks` hash whole prefixes."""

    arrival_s: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


class Form(NamedTuple):
    """How a format is read: `lines` yields (line number, fields); `second` and the names find the columns."""

    lines: Callable[[Iterator[str]], Iterator[tuple[int, Mapping[str, Any]]]]
    time: str
    second: Callable[[Any], float]
    prompt: str
    output: str
    blocks: str | None = None


class _BadRow(ValueError):
    """What is wrong with a row; `line` is its number in the file."""

    def __init__(self, line: int, reason: str) -> None:
        self.line = line
        super().__init__(reason)


def _objects(file: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _BadRow(number, f"not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise _BadRow(number, "not a JSON object")
        yield number, row


def _table(file: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _BadRow(reader.line_num, str(error)) from None


def _stamp(text: Any) -> float:
    """Seconds of "2023-11-16 18:15:46.6805900"; digits below a microsecond are beyond `datetime`."""
    return datetime.fromisoformat(text[:26]).replace(tzinfo=UTC).timestamp()


def _thousandth(value: Any) -> float:
    return float(value) / 1e3


#: mooncake: JSON lines, time in ms; azure: CSV; vllm: JSON lines as a vLLM run logs its requests, time in s
FORMATS: Mapping[str, Form] = {
    "mooncake": Form(_objects, "timestamp", _thousandth, "input_length", "output_length", "hash_ids"),
    "azure": Form(_table, "TIMESTAMP", _stamp, "ContextTokens", "GeneratedTokens"),
    "vllm": Form(_objects, "arrival_time", float, "input_toks", "output_toks"),
}


def detect(path: str | Path) -> str:
    """The format of a trace file, by the names in its first line. Raises FileMissing or FileUnreadable."""
    file = Path(path)
    with closing(_opened(file)) as lines:
        first = next((line for line in _text(file, "text", lines) if line.strip()), "")
    if not first:
        raise _unreadable(file, "a trace", "it is empty", "Give a file with one request per line.")
    for name, form in FORMATS.items():
        if all(column in first for column in (form.time, form.prompt, form.output)):
            return name
    forms = "; ".join(f"{name}: {f.time}, {f.prompt}, {f.output}" for name, f in FORMATS.items())
    raise _unreadable(
        file, "a trace", "its first line names the columns of no known format", f"Known: {forms}."
    )


def read(path: str | Path, form: str, limit: int | None = None) -> Iterator[TraceRow]:
    """The requests of a trace file, in order; of the first `limit` rows only, if given.

    Raises UnknownName for a format, FileMissing, or FileUnreadable: an empty file, a column that is
    missing, a number that is none, times that run backwards or are negative, requests without tokens.
    """
    if form not in FORMATS:
        raise UnknownName(
            field="format", value=form, kind="trace format", mend=f"Known: {', '.join(FORMATS)}."
        )
    return islice(_rows(Path(path), form), limit)


@dataclass(frozen=True, slots=True)
class Scan:
    """A trace in numbers.

    prompt, output   mean tokens          longest   tokens of the longest request, both together
    shares           some prefix blocks occur in several requests
    """

    path: Path
    format: str
    requests: int
    seconds: float
    prompt: float
    output: float
    longest: int
    shares: bool


def scan(
    path: str | Path, form: str | None = None, limit: int | None = None, rate_scale: float = 1.0
) -> Scan:
    """Reads a whole trace, so that what is wrong with it is said before anything is done with it.

    The format is told by the file when left out; times are divided by `rate_scale`. Raises as `read` does.
    """
    form = detect(path) if form is None else form
    count = prompt = output = longest = 0
    last, shares, seen = 0.0, False, set[int]()
    for row in read(path, form, limit):
        count += 1
        prompt += row.prompt
        output += row.output
        longest = max(longest, row.prompt + row.output)
        last = row.arrival_s
        if row.blocks and not shares:
            shares = not seen.isdisjoint(row.blocks)
            seen.update(row.blocks)
    return Scan(Path(path), form, count, last / rate_scale, prompt / count, output / count, longest, shares)


def _rows(path: Path, name: str) -> Iterator[TraceRow]:
    form, kind = FORMATS[name], f"{'an' if name == 'azure' else 'a'} {name} trace"
    first: float | None = None
    before, before_line = -math.inf, 0
    with closing(_opened(path)) as file:
        try:
            for line, row in form.lines(_text(path, kind, file)):
                time = _time(row, form, line)
                if time < before:
                    _refuse(line, f"{form.time} {row[form.time]!r} is earlier than that of row {before_line}")
                before, before_line = time, line
                first = time if first is None else first
                prompt, output = _tokens(row, form.prompt, line), _tokens(row, form.output, line)
                yield TraceRow(time - first, prompt, output, _blocks(row, form, line))
        except _BadRow as error:
            mend = "Check the row" + (", and that --format is right." if first is None else ".")
            raise _unreadable(path, kind, f"row {error.line}: {error}", mend) from None
    if first is None:
        raise _unreadable(path, kind, "it holds no requests", "Give a file with one request per line.")


def _field(row: Mapping[str, Any], name: str, line: int) -> Any:
    if row.get(name) is None:
        _refuse(line, f"there is no {name}; found {', '.join(str(key) for key in row) or 'nothing'}")
    return row[name]


def _time(row: Mapping[str, Any], form: Form, line: int) -> float:
    raw = _field(row, form.time, line)
    try:
        found = form.second(raw)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        _refuse(line, f"{form.time} = {raw!r} is not a time")
    if found < 0:
        _refuse(line, f"{form.time} = {raw!r} is negative")
    return found


def _tokens(row: Mapping[str, Any], name: str, line: int) -> int:
    raw = _field(row, name, line)
    try:
        found = float(raw)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or found != int(found):
        _refuse(line, f"{name} = {raw!r} is not a number of tokens")
    if found < 1:
        _refuse(line, f"{name} = {raw!r}: a request has at least one token")
    return int(found)


def _blocks(row: Mapping[str, Any], form: Form, line: int) -> tuple[int, ...]:
    raw = row.get(form.blocks) if form.blocks else None
    if raw is None:
        return ()
    if not isinstance(raw, list) or not all(isinstance(item, int) for item in raw):
        _refuse(line, f"{form.blocks} is not a list of whole numbers")
    return tuple(raw)


def _refuse(line: int, reason: str) -> NoReturn:
    raise _BadRow(line, reason)


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise FileMissing(what="trace", path=path, mend="Name a file that exists.")
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise _unreadable(path, "text", str(error.strerror), "Check its permissions.") from None


def _text(path: Path, kind: str, file: Iterator[str]) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise _unreadable(
            path, kind, f"not UTF-8 text ({error.reason})", "Decompress or convert it."
        ) from None


def _unreadable(path: Path, form: str, reason: str, mend: str) -> FileUnreadable:
    return FileUnreadable(what="trace", path=path, format=form, reason=reason, mend=mend)
