"""Files and folders that are written whole or not at all: first beside their place, then put there by one
rename, so that a reader (or a kill) never meets half of one."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """A text file to write; it takes its name when the block ends, and is gone where the block raises.

    Line ends are written as given. Raises OSError where the folder cannot be written.
    """
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `target`, or of what is there, when the block ends, and is gone
    where the block raises. What killed runs left beside the target is cleared.

    Raises OSError where it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(target)
    part = target.parent / f".{target.name}.{os.getpid()}.part"
    part.mkdir()
    try:
        yield part
        _put(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes texts by their paths in a folder; shell scripts may be run."""
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
        if name.endswith(".sh"):
            file.chmod(file.stat().st_mode | 0o111)


def _put(part: Path, target: Path) -> None:
    """Puts `part` where `target` is, in one step; what was there ends up in `part`."""
    if not target.exists():
        part.rename(target)
    elif not _exchange(part, target):  # no such call here: there is a moment without the target
        aside = part.with_suffix(".old")
        target.rename(aside)
        part.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths atomically (Linux renameat2); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_cwd, exchange = -100, 2
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def _clear_abandoned(target: Path) -> None:
    """Removes parts that a killed run left beside the target."""
    for left in target.parent.glob(f".{_literal(target.name)}.*.part"):
        found = re.fullmatch(r"\.(\d+)\.part", left.name.removeprefix(f".{target.name}"))
        if found and not _alive(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
