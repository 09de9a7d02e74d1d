"""What a model *is*, as a short hash, computed without torch.

`fingerprint` goes into tables and plans: the model's configuration and the versions of what traces
it. `source_digest` covers planc's own code, so that a cache never outlives the code that filled it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from planc.errors import FileMissing, FileUnreadable
from planc.version import __version__

#: Rooms whose code decides what a trace and its table hold.
_ROOMS = ("ir", "ir/ops", "ir/trace", "passes", "cost_model/table.py")


def fingerprint(source: str | Path, versions: Mapping[str, str] | None = None) -> str:
    """Hash of a model file or folder: its configuration (or content) and the versions that trace it.

    Of a configuration the JSON value counts, not its spelling. Raises FileMissing or FileUnreadable.
    """
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileMissing(what="model", path=file, mend="Name a config.json, a model folder or a .pt2 file.")
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            content = json.dumps(json.loads(content), sort_keys=True, separators=(",", ":")).encode()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FileUnreadable(
                what="model", path=file, format="JSON", reason=error, mend="Is it a config.json?"
            ) from None
    code = sorted(path.glob("*.py")) if path.is_dir() else []
    parts = [content, *(item.read_bytes() for item in code)]
    stated = json.dumps(dict(versions or installed()), sort_keys=True).encode()
    return _digest([stated, *parts])


def text_fingerprint(text: str) -> str:
    """The same for a model without a file: hash of its traced graph as text."""
    return _digest([json.dumps(installed(), sort_keys=True).encode(), text.encode()])


def installed() -> dict[str, str]:
    """Versions of planc, torch and transformers, read from package metadata: nothing is imported."""
    return {"planc": __version__, "torch": _version("torch"), "transformers": _version("transformers")}


def source_digest() -> str:
    """Hash of the planc code that traces and tabulates."""
    house = Path(__file__).resolve().parents[2]
    files: list[Path] = []
    for room in _ROOMS:
        place = house / room
        files += [place] if place.suffix == ".py" else sorted(place.glob("*.py"))
    return _digest([file.read_bytes() for file in files])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:16]
