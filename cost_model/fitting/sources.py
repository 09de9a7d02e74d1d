"""Where measured operator rows are read from.

`tables` reads the Parquet tables of `aiconfigurator-core` (Apache-2.0; `pip install planc[measured]`),
12.6 million rows of kernels timed alone: `systems/data/<gpu>/<family>/<engine>/<version>/<table>.parquet`,
latencies in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planc.errors import MissingDependency

#: folder of the tables -> name in planc's catalogue
GPUS = {
    "a100_sxm": "a100_sxm",
    "h100_sxm": "h100_sxm",
    "h200_sxm": "h200_sxm",
    "b200_sxm": "b200_sxm",
    "b300_sxm": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx_pro_6000",
}

#: when the tables were read
DATE = "2026-11-20"

SOURCE = "aiconfigurator-core 0.12.0 operator tables (Apache-2.0)"


@dataclass(frozen=True, slots=True)
class Source:
    """One Parquet table of one engine version on one GPU."""

    gpu: str
    family: str
    engine: str
    version: str
    table: str
    path: Path

    def read(self) -> Any:
        """The rows as a pandas DataFrame."""
        try:
            import pandas
        except ImportError as error:
            raise MissingDependency(package="pandas", extra="measured") from error
        return pandas.read_parquet(self.path)


def root() -> Path:
    """The folder of the installed tables. Raises MissingDependency."""
    try:
        import aiconfigurator_core
    except ImportError as error:
        raise MissingDependency(package="aiconfigurator-core", extra="measured") from error
    return Path(aiconfigurator_core.__file__).parent / "systems" / "data"


def tables(
    folder: Path, family: str, table: str, *, gpu: str | None = None, newest: bool = True
) -> Iterator[Source]:
    """Tables of a family, e.g. ("gemm", "gemm_perf"); of each engine the newest version only by default.

    `gpu` is a name of planc's catalogue.
    """
    for theirs, ours in GPUS.items():
        if gpu is not None and gpu != ours:
            continue
        for engine in sorted((folder / theirs / family).glob("*")):
            found = [v for v in engine.glob("*") if (v / f"{table}.parquet").is_file()]
            found.sort(key=lambda v: version_key(v.name))
            for version in found[-1:] if newest else found:
                yield Source(ours, family, engine.name, version.name, table, version / f"{table}.parquet")


def by_engine(
    folder: Path, family: str, table: str, gpu: str, served: Mapping[str, str]
) -> dict[str, list[Source]]:
    """A GPU's tables of each engine, the best version for what planc serves first.

    That is the newest one up to the engine's own version (`served`), older ones after it, then newer ones
    from the oldest on; for engines that are not served, the newest first.
    """
    found: dict[str, list[Source]] = {}
    for source in tables(folder, family, table, gpu=gpu, newest=False):
        found.setdefault(source.engine, []).append(source)
    for engine, mine in found.items():
        mine.sort(key=lambda s: version_key(s.version), reverse=True)
        if engine in served:
            limit = version_key(served[engine] + ".999")
            newer = [s for s in mine if version_key(s.version) > limit]
            found[engine] = [s for s in mine if version_key(s.version) <= limit] + newer[::-1]
    return found


def version_key(name: str) -> tuple[int, ...]:
    """What versions sort by: their numbers, "1.3.0rc20" -> (1, 3, 0, 20)."""
    return tuple(int(part) for part in re.findall(r"\d+", name))
