"""What the wheel must hold: every package folder, and every file of data that the code reads."""

from __future__ import annotations

import tomllib
from pathlib import Path, PurePosixPath

from tests.roof.support import ROOT

SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
ROOMS = ("planc", "ir", "cost_model", "passes", "planner", "codegen", "runtime")


def package_of(folder: Path) -> str:
    """A folder of the repository as a package name, e.g. ir/ops -> planc.ir.ops."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "planc" else ("planc", *parts))


def files(pattern: str) -> list[Path]:
    found = [path for room in ROOMS for path in (ROOT / room).rglob(pattern)]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def test_every_folder_of_code_is_a_listed_package() -> None:
    assert {package_of(path.parent) for path in files("*.py")} <= set(SETUP["packages"])


def test_every_data_file_is_package_data() -> None:
    listed, patterns = set(SETUP["packages"]), SETUP["package-data"]["*"]
    for path in files("*"):
        if path.suffix in (".py", ".pyc"):
            continue
        home = path.parent
        while package_of(home) not in listed:
            home = home.parent
        inside = PurePosixPath(path.relative_to(home).as_posix())
        assert any(matches(inside, pattern) for pattern in patterns), inside


def matches(path: PurePosixPath, pattern: str) -> bool:
    """Setuptools' globs: `**/` also stands for no folder at all."""
    deep = pattern.startswith("**/")
    return path.match(pattern.removeprefix("**/")) and (deep or len(path.parts) == 1)
