"""A serving engine as its clients see it: started, loaded in a closed loop, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planc.errors import ToolFailed

_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it, s. tpot: (last - first token) / (tokens - 1)."""

    ttft: float
    tpot: float
    e2e: float


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path], log: Path, variables: Mapping[str, str], patience_s: float = 600.0
) -> Iterator[int]:
    """Starts a server, waits until it answers, yields its port, and ends its whole process group.

    command    without the port, which is handed over as `--port` and as the variable PORT
    Raises ToolFailed where it does not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {**os.environ, **_QUIET, **variables, "PORT": str(port)}
    with log.open("wb") as out:
        words = [*map(str, command), "--port", str(port)]
        try:
            process = subprocess.Popen(
                words, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as error:
            raise ToolFailed(tool=words[0], reason=error, mend="Check the path.") from None
        try:
            _wait(process, port, patience_s, log)
            yield port
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, patience_s: float, log: Path) -> None:
    end = time.monotonic() + patience_s
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = log.read_text(errors="replace").splitlines()[-5:]
    raise ToolFailed(
        tool="the engine's server",
        reason=f"it did not come up (exit code {process.poll()}): {' / '.join(tail)}",
        mend=f"Its log is {log}.",
    )


def closed_loop(port: int, model: str, prompts: Sequence[str], concurrency: int, output: int) -> list[Answer]:
    """Sends all prompts, `concurrency` at a time, greedy, `output` tokens each, streamed."""

    async def all_of_them() -> list[Answer]:
        waiting = iter(prompts)
        found: list[Answer] = []

        async def client() -> None:
            for prompt in waiting:
                found.append(await _request(port, model, prompt, output))

        await asyncio.gather(*(client() for _ in range(min(concurrency, len(prompts)))))
        return found

    return asyncio.run(all_of_them())


async def _request(port: int, model: str, prompt: str, output: int) -> Answer:
    asked = {"model": model, "prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**asked, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    status = (await reader.readline()).decode(errors="replace")
    if " 200 " not in status:
        raise ToolFailed(tool="the engine's server", reason=status.strip(), mend="See its log.")
    first = last = 0.0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            last = time.perf_counter()
            first = first or last
    writer.close()
    return Answer(first - start, (last - first) / max(output - 1, 1), last - start)
