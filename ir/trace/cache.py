"""The cache of traces and cost tables: a folder of small text files. Imports no torch.

An entry is written whole or not at all (to a temporary name, then renamed) and starts with the hash
of the rest. One that is damaged, or that cannot be read or written, is made anew with a log line;
no fault of the cache ever stops a compilation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from planc.files import whole
from planc.ir.trace.fingerprint import fingerprint, source_digest

if TYPE_CHECKING:
    from planc.ir.graph import Graph

_LOG = logging.getLogger("planc")


def folder(cache: Path | None = None) -> Path:
    """The cache folder: the one given, else $PLANC_CACHE, else $XDG_CACHE_HOME/planc or ~/.cache/planc."""
    if cache is not None:
        return cache
    if named := os.environ.get("PLANC_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planc"


def key(source: str | Path) -> str:
    """The key of what is derived from a model file: the model, versions, and planc's own code."""
    both = f"{fingerprint(source)} {source_digest()}"
    return hashlib.sha256(both.encode()).hexdigest()[:24]


def read(cache: Path | None, name: str) -> str | None:
    """The entry called `name` ("<key>.table.json"), or None when there is none or it is damaged."""
    file = folder(cache) / name
    try:
        stated, _, text = file.read_text(encoding="utf-8").partition("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _LOG.warning("cache entry %s could not be read (%s); it is made anew", file, error)
        return None
    if stated != _hash(text):
        _LOG.warning("cache entry %s is damaged; it is made anew", file)
        return None
    return text


def write(cache: Path | None, name: str, text: str) -> None:
    """Stores an entry, atomically: readers see the old one or the new one, never half of it."""
    file = folder(cache) / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as entry:
            entry.write(f"{_hash(text)}\n{text}")
    except OSError as error:
        _LOG.warning("cache entry %s could not be written (%s)", file, error)


def cached_trace(source: Path, cache: Path | None, make: Callable[[], Graph]) -> Graph:
    """The traced graph of a model file: from the cache, or made now and stored."""
    from planc.ir.trace.store import dumps, loads

    name = f"{key(source)}.graph.json"
    text = read(cache, name)
    if text is not None:
        try:
            return loads(text)
        except (json.JSONDecodeError, KeyError, ValueError, TypeError, AttributeError) as error:
            _LOG.warning("cache entry %s does not load (%s); it is made anew", name, error)
    graph = make()
    write(cache, name, dumps(graph))
    return graph


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
