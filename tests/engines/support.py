"""What the engine tests share: the vLLM environment, tokenizers, commands of launch scripts, servers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("PLANC_ENGINES_ENV", ROOT / ".venv-engines"))


def environment() -> Path:
    """The folder of vLLM's programs. A missing environment is a failure, never a skip."""
    assert (ENVIRONMENT / ".complete").is_file(), (
        f"{ENVIRONMENT} is not complete; run tests/engines/setup_vllm.sh (make test-engines does)"
    )
    return ENVIRONMENT / "bin"


def save_tokenizer(folder: Path) -> int:
    """Writes a small byte-level BPE tokenizer, trained on the spot. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 50, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    whole.save_pretrained(folder)
    return len(whole)


@dataclass(frozen=True, slots=True)
class Server:
    """A running `vllm serve`."""

    port: int
    model: str

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """Token ids that follow a prompt of token ids, most likely first."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return found


@contextlib.contextmanager
def serving(
    script: Path, model: str, log: Path, *options: str, variables: Mapping[str, str], patience_s: float = 300
) -> Iterator[Server]:
    """Starts a bundle's launch script, waits until it answers, and ends its whole process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PORT": str(port)}
    path = f"{environment()}:{os.environ['PATH']}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [script, "0", *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, **offline, **variables},
            start_new_session=True,
        )
        try:
            _wait(process, port, patience_s, log)
            yield Server(port, model)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, patience_s: float, log: Path) -> None:
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    raise AssertionError(f"vllm serve did not come up (exit code {process.poll()}):\n{tail}")
