"""Asking an engine itself: does its own parser read the configurations that a bundle holds?

The engine is not a dependency of planc: its Python may be another environment's. What runs there is a
probe (`<engine>_probe.py`), which needs neither weights nor a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from planc.errors import FileMissing, ToolFailed

#: engine -> the probe that runs in its environment
PROBES = {"vllm": "vllm_probe.py"}


def accept(engine: str, bundle: Path, *, python: str | None = None) -> dict[str, str | None] | None:
    """What the engine said of each launch script of a bundle: None (accepted) or its error.

    python   an interpreter that has the engine; None: this one. Returns None where it has no such engine.
    Raises FileMissing (no such interpreter) and ToolFailed (the probe itself died).
    """
    if engine not in PROBES or (python is None and importlib.util.find_spec(engine) is None):
        return None
    if python is not None and not Path(python).is_file():
        raise FileMissing(
            what="--engine-python", path=python, mend="Name the engine environment's bin/python."
        )
    with tempfile.TemporaryDirectory() as scratch:
        asked = [
            {"name": str(script.parent.name), **launch_command(script, Path(scratch), bundle)}
            for script in sorted((bundle / "engines" / engine).glob("*/launch.sh"))
        ]
        answers = probe(engine, asked, python=python)
    return {name: answer["error"] for name, answer in answers.items()}


def launch_command(script: Path, scratch: Path, bundle: Path) -> dict[str, Any]:
    """What a launch script would run: {"argv", "env"}, caught by a stand-in for the engine on the PATH.

    The model is the bundle's own configuration, so that no weights are needed.
    """
    caught = scratch / "caught.json"
    stand_in = scratch / "vllm"
    stand_in.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\n"
        "env = {k: v for k, v in os.environ.items() if k.startswith(('VLLM_', 'OMP_'))}\n"
        f"json.dump({{'argv': sys.argv[1:], 'env': env}}, open({str(caught)!r}, 'w'))\n",
        encoding="utf-8",
    )
    stand_in.chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "CUDA_", "OMP_"))}
    model = str((bundle / "model").absolute())
    first_node = {"HEAD_ADDR": "127.0.0.1", "NODE_RANK": "0", "ANY_WEIGHTS": "1"}
    environment = {**inherited, **first_node, "PATH": f"{scratch}:{inherited['PATH']}", "MODEL": model}
    done = subprocess.run(["bash", script, "0"], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolFailed(
            tool=str(script),
            reason=done.stderr.strip() or f"exit code {done.returncode}",
            mend="Compile again.",
        )
    found: dict[str, Any] = json.loads(caught.read_text(encoding="utf-8"))
    found["argv"] += ["--skip-tokenizer-init"]
    return found


def probe(engine: str, asked: list[dict[str, Any]], *, python: str | None = None) -> dict[str, Any]:
    """The probe's answers, by name: {"error": text or None, "settings": {...}}."""
    script = Path(__file__).parent / PROBES[engine]
    done = subprocess.run(
        [python or sys.executable, "-I", script],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ToolFailed(tool=f"{engine}'s parser", reason=tail[0], mend="Does its environment start?")
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers
