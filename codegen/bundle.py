"""The bundle folder: everything that one plan says, written whole or not at all.

    plan.json               the plan
    model/config.json       the model's own configuration, where it has one
    kernels/                one Triton file per kernel, manifest.json
    engines/<engine>/       configuration and launch scripts
    experts/ep<ranks>.json  where routed experts lie, where their load was stated
    front.json, front/      the other plans of a Pareto front, where one was asked for
    report.html, README.md  for people; report.json is what the report is drawn from besides the plan

All files are first written beside the target and then put in place by one rename, so a reader (or a
kill) never meets half a bundle.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planc.codegen import report
from planc.codegen.engines import WRITERS, engines_of, writer
from planc.codegen.readme import readme
from planc.codegen.triton import render as triton
from planc.errors import InvalidBundle
from planc.planner import front
from planc.planner.plan import Plan, canonical_json


def files(plan: Plan, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Every file of a bundle by its path in it. The same plan and configuration give the same text."""
    kernels = triton.kernels(plan, config)
    out = {
        "plan.json": plan.canonical(),
        "README.md": readme(plan, kernels),
        "report.html": report.html(plan, kernels),
        "kernels/manifest.json": triton.manifest(plan, kernels),
        **{f"kernels/{kernel.file}": kernel.source for kernel in kernels},
    }
    if plan._evidence is not None:
        out["report.json"] = plan._evidence.canonical()
    if plan._front is not None:
        out["front.json"] = canonical_json(front.document(plan._front))
        for number, point in enumerate(plan._front.points):
            if number != plan._front.chosen:
                out[front.file(plan._front, number)] = point.plan.canonical()
    if config is not None:
        out["model/config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    for experts in plan.experts:
        placed = {"physical_to_logical_map": experts.physical_to_logical}
        copies = f"-copies{experts.copies}" if experts.copies else ""
        out[f"experts/ep{experts.ranks}{copies}.json"] = json.dumps(placed, separators=(",", ":")) + "\n"
    for engine in engines_of(plan):
        if engine in WRITERS:
            for name, text in writer(engine).render(plan, config).items():
                out[f"engines/{engine}/{name}"] = text
    return out


def write(plan: Plan, folder: str | Path, *, config: Mapping[str, Any] | None = None) -> None:
    """Writes a plan's bundle, replacing an earlier bundle of that name.

    config   the model's own configuration (a Hugging Face `config.json`), None for plain modules

    Raises InvalidBundle where `folder` is something else than a bundle or cannot be written, and
    whatever rendering raises; nothing is written then.
    """
    contents = files(plan, config)
    target = Path(folder).absolute()
    target = target.resolve() if target.is_symlink() else target
    _refuse_unless_bundle(target, folder)
    part = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target)
        _fill(part, contents)
        _put(part, target)
    except OSError as error:
        raise InvalidBundle(
            path=folder,
            reason=f"cannot be written ({error.strerror or error})",
            mend="Choose another folder.",
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_bundle(folder: Path) -> bool:
    """Does the folder hold a plan of planc's (of whatever version)?"""
    try:
        found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "schema_version" in found


def _refuse_unless_bundle(target: Path, named: str | Path) -> None:
    if not target.exists():
        return
    if target.is_dir() and (is_bundle(target) or not any(target.iterdir())):
        return
    raise InvalidBundle(
        path=named,
        reason="is there already and is not a bundle, so it is not overwritten",
        mend="Name a new folder, or remove this one yourself.",
    )


def _fill(part: Path, contents: Mapping[str, str]) -> None:
    part.mkdir()
    for name, text in contents.items():
        file = part / name
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
