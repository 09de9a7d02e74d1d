"""Runs the README's own commands, so that what it shows is what they print.

    python docs/readme.py            rewrites the output below each `$ command` of the console blocks
    python docs/readme.py --check    runs them all and fails if one does not end as the README says

A command may be followed by `# exit 1` where that is how it ends. Output is cut after 40 lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
_MOST = 40


def run(command: str) -> tuple[str, int]:
    """Combined output and exit code, from the repository's root with its environment first on the PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "110", "TERM": "dumb"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout, done.returncode


def refreshed(block: re.Match[str]) -> str:
    """One console block with the outputs of now. Raises SystemExit where a command fails."""
    shown = []
    for line in block[1].splitlines():
        if not line.startswith("$ "):
            continue
        command, _, remark = line[2:].partition("  # exit ")
        print(f"$ {command}", flush=True)
        output, code = run(command)
        if code != int(remark or 0):
            sys.exit(f"{output}\nREADME: `{command}` ended with exit code {code}")
        lines = [text.rstrip() for text in output.rstrip().splitlines()]
        if len(lines) > _MOST:
            lines = [*lines[:_MOST], f"... {len(lines) - _MOST} more lines"]
        shown += [line, *lines]
    return "```console\n" + "\n".join(shown) + "\n```"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    new = _BLOCK.sub(refreshed, text)
    if "--check" not in sys.argv[1:]:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
