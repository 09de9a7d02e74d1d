"""The bundle folder: everything that one plan says, written whole or not at all.

    plan.json               the plan
    model/config.json       the model's own configuration, where it has one
    kernels/                one Triton file per kernel, manifest.json
    engines/<engine>/       configuration and launch scripts
    experts/ep<ranks>.json  where routed experts lie, where their load was stated
    front.json, front/      the other plans of a Pareto front, where one was asked for
    report.html, README.md  for people; report.json is what the report is drawn from besides the plan

Several models that share an inventory have a folder of bundles, and `fleet.json`. All files are first
written beside the target and then put in place by one rename, so a reader (or a kill) never meets half.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planc.codegen import report
from planc.codegen.engines import WRITERS, engines_of, writer
from planc.codegen.readme import readme
from planc.codegen.triton import render as triton
from planc.errors import InvalidBundle
from planc.files import whole_folder, write_files
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
    target = place(folder)
    _write(files(plan, config), folder, target)


def write_several(
    plans: Mapping[str, tuple[Plan, Mapping[str, Any] | None]], summary: Mapping[str, Any], folder: str | Path
) -> None:
    """Writes the bundles of a fleet of several models, FOLDER/NAME, and `fleet.json`, which sums them up.

    plans   by name, each with its model's own configuration

    Raises as `write` does.
    """
    contents = {"fleet.json": json.dumps(summary, indent=2, sort_keys=True) + "\n"}
    for name, (plan, config) in plans.items():
        contents |= {f"{name}/{file}": text for file, text in files(plan, config).items()}
    _write(contents, folder, place(folder, several=True))


def place(folder: str | Path, *, several: bool = False) -> Path:
    """Where a bundle goes, or those of `several` models. Raises InvalidBundle where something else is."""
    target = Path(folder).absolute()
    target = target.resolve() if target.is_symlink() else target
    replaceable, kind = (is_fleet, "a fleet of several models") if several else (is_bundle, "a bundle")
    if target.exists() and not (target.is_dir() and (replaceable(target) or not any(target.iterdir()))):
        raise InvalidBundle(
            path=folder,
            reason=f"is there already and is not {kind}, so it is not overwritten",
            mend="Name a new folder, or remove this one yourself.",
        )
    return target


def _write(contents: Mapping[str, str], folder: str | Path, target: Path) -> None:
    try:
        with whole_folder(target) as part:
            write_files(part, contents)
    except OSError as error:
        raise InvalidBundle(
            path=folder,
            reason=f"cannot be written ({error.strerror or error})",
            mend="Choose another folder.",
        ) from None


def is_bundle(folder: Path) -> bool:
    """Does the folder hold a plan of planc's (of whatever version)?"""
    return "schema_version" in _read(folder / "plan.json")


def is_fleet(folder: Path) -> bool:
    """Does the folder hold the plans of several models?"""
    return "models" in _read(folder / "fleet.json")


def _read(file: Path) -> Mapping[str, Any]:
    """A JSON object, empty where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
