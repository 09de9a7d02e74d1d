"""Sends requests to the engines of a plan.

    python router.py [--port 9000] [--at node0=10.0.0.1 ...]

Speaks HTTP like the engines behind it. A request goes to an engine that does all of it; or to a prefill
engine for one token, and what that answers about its cache goes with the request to a decode engine, whose
answer is passed on as it comes. `router.json` beside this file lists the engines and the policy to choose by:

    least_loaded    fewest open requests for its share
    power_of_two    the less loaded of two drawn at random
    round_robin     in turn, by shares
    prefix_aware    least text that it has not seen and that waits: open requests' and the new one's

Requests of a traffic class say so in the header X-Traffic-Class. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import sys
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

LONGEST_HEAD = 1 << 16
HEALTH = ("/health", "/v1/models", "/version")
#: a prefix is known by blocks of so many characters, of which a token has about four
BLOCK, CHARACTERS = 512, 4


class Engine:
    """One instance: where it listens, its share of the requests, what it holds now, and whose prefixes it has
    seen as far as its cache may still hold them."""

    def __init__(self, host: str, port: int, share: float, cache_tokens: int = 0) -> None:
        self.host, self.port, self.share = host, port, share
        self.open = self.waiting = 0
        self.seen: OrderedDict[bytes, None] = OrderedDict()
        self.most = cache_tokens * CHARACTERS // BLOCK

    @property
    def pressure(self) -> float:
        return (self.open + 1) / self.share


class Route:
    """Engines that serve requests of some classes: whole ones, or a prefill and a decode pool."""

    def __init__(self, entry: dict[str, Any], at: dict[str, str]) -> None:
        def engines(name: str) -> list[Engine]:
            return [
                Engine(at.get(e["node"], e["node"]), e["port"], e["share"], e.get("cache_tokens", 0))
                for e in entry.get(name, ())
            ]

        self.classes = frozenset(entry["classes"])
        self.whole, self.prefill, self.decode = map(engines, ("whole", "prefill", "decode"))
        self.share = sum(engine.share for engine in self.whole + self.prefill)
        self.open = 0

    @property
    def pressure(self) -> float:
        return (self.open + 1) / self.share


class LeastLoaded:
    def choose(self, engines: list[Engine], blocks: list[bytes]) -> Engine:
        return min(engines, key=lambda engine: engine.pressure)


class PowerOfTwo:
    def __init__(self) -> None:
        self.random = random.Random(0)

    def choose(self, engines: list[Engine], blocks: list[bytes]) -> Engine:
        drawn = self.random.sample(engines, min(2, len(engines)))
        return min(drawn, key=lambda engine: engine.pressure)


class RoundRobin:
    """Smooth weighted round-robin, as nginx does it."""

    def __init__(self) -> None:
        self.credit: dict[Engine, float] = {}

    def choose(self, engines: list[Engine], blocks: list[bytes]) -> Engine:
        for engine in engines:
            self.credit[engine] = self.credit.get(engine, 0.0) + engine.share
        best = max(engines, key=lambda engine: self.credit[engine])
        self.credit[best] -= sum(engine.share for engine in engines)
        return best


class PrefixAware:
    def choose(self, engines: list[Engine], blocks: list[bytes]) -> Engine:
        mean = sum(engine.share for engine in engines) / len(engines)

        def cost(engine: Engine) -> tuple[float, float]:
            known = next((i for i, block in enumerate(blocks) if block not in engine.seen), len(blocks))
            return len(blocks) - known + engine.waiting * mean / engine.share, engine.pressure

        best = min(engines, key=cost)
        for block in blocks:
            best.seen[block] = None
            best.seen.move_to_end(block)
        while len(best.seen) > best.most:
            best.seen.popitem(last=False)
        return best


POLICIES: dict[str, Any] = {
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "round_robin": RoundRobin,
    "prefix_aware": PrefixAware,
}


def prefix_blocks(asked: dict[str, Any]) -> list[bytes]:
    """A digest of the request's text up to the end of each whole block."""
    text = json.dumps(asked.get("messages") or asked.get("prompt", ""), ensure_ascii=False)
    digest, found = hashlib.blake2b(digest_size=8), []
    for end in range(BLOCK, len(text) + 1, BLOCK):
        digest.update(text[end - BLOCK : end].encode())
        found.append(digest.digest())
    return found


class Refused(Exception):
    """An answer of the router's own."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


class Router:
    """`routes` and `policy` as in router.json; `at` maps node names to addresses."""

    def __init__(
        self, routes: list[dict[str, Any]], at: dict[str, str] | None = None, policy: str = "least_loaded"
    ) -> None:
        self.routes = [Route(entry, at or {}) for entry in routes]
        self.policy, self.decoders = POLICIES[policy](), LeastLoaded()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        try:
            method, path, headers, body = await _request(reader)
            if method == "GET" and path.split("?")[0] in HEALTH:
                route = self.routes[0]
                await _relay((route.whole or route.decode)[0], method, path, headers, b"", writer)
            elif method == "POST":
                await self._serve(path, headers, body, writer)
            else:
                raise Refused("404 Not Found", f"no {method} {path} here")
        except Refused as error:
            writer.write(_answer(error.status, {"error": {"message": str(error)}}))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _serve(
        self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        try:
            asked = json.loads(body)
        except ValueError:
            raise Refused("400 Bad Request", "the body is not JSON") from None
        if not isinstance(asked, dict):
            raise Refused("400 Bad Request", "the body is not a JSON object")
        route = self._route(headers.get("x-traffic-class", ""))
        headers = {**headers, "x-request-id": headers.get("x-request-id") or uuid.uuid4().hex}
        blocks = prefix_blocks(asked)
        route.open += 1
        try:
            first = self.policy.choose(route.whole or route.prefill, blocks)
            if route.whole:
                await _held(first, blocks, _relay(first, "POST", path, headers, body, writer))
                return
            status, answer = await _held(first, blocks, _call(first, path, headers, first_token_only(asked)))
            if status != 200:
                writer.write(_answer(f"{status} Prefill Failed", answer))
                return
            both = json.dumps({**asked, "kv_transfer_params": answer.get("kv_transfer_params")}).encode()
            second = self.decoders.choose(route.decode, blocks)
            await _held(second, blocks, _relay(second, "POST", path, headers, both, writer))
        finally:
            route.open -= 1

    def _route(self, name: str) -> Route:
        able = [route for route in self.routes if not route.classes or not name or name in route.classes]
        if not able:
            raise Refused("404 Not Found", f"no engine serves requests of class {name!r}")
        return min(able, key=lambda route: route.pressure)


def first_token_only(asked: dict[str, Any]) -> dict[str, Any]:
    """The request as a prefill engine has it: one token, its cache kept for another engine to fetch."""
    limits: dict[str, Any] = {
        name: 1 for name in ("max_tokens", "max_completion_tokens", "min_tokens") if name in asked
    }
    kept = {name: value for name, value in asked.items() if name not in ("stream_options", *limits)}
    transfer = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    return {**kept, "max_tokens": 1, **limits, "stream": False, "kv_transfer_params": transfer}


async def _held(engine: Engine, blocks: list[bytes], action: Any) -> Any:
    """Does something with an engine, which counts it while it lasts."""
    engine.open += 1
    engine.waiting += len(blocks)
    try:
        return await action
    finally:
        engine.open -= 1
        engine.waiting -= len(blocks)


async def _request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes]:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.LimitOverrunError:
        raise Refused("431 Request Header Fields Too Large", "the head is too long") from None
    first, *lines = head.split("\r\n")
    words = first.split(" ")
    if len(words) != 3:
        raise Refused("400 Bad Request", "this is not HTTP")
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    length = headers.get("content-length", "0")
    if not length.isdigit() or "transfer-encoding" in headers:
        raise Refused("411 Length Required", "a body needs a Content-Length")
    return words[0], words[1], headers, await reader.readexactly(int(length))


async def _send(
    engine: Engine, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a request to an engine, which closes the connection after its answer."""
    try:
        reader, writer = await asyncio.open_connection(engine.host, engine.port, limit=LONGEST_HEAD)
    except OSError as error:
        raise Refused("502 Bad Gateway", f"{engine.host}:{engine.port}: {error}") from None
    own = {"host": f"{engine.host}:{engine.port}", "connection": "close", "content-length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in {**headers, **own}.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    await writer.drain()
    return reader, writer


async def _call(
    engine: Engine, path: str, headers: dict[str, str], asked: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """(status, answer) of a request whose answer is one JSON object."""
    reader, writer = await _send(engine, "POST", path, headers, json.dumps(asked).encode())
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        body = await reader.read()
        if "transfer-encoding: chunked" in head:
            body = _joined(body)
        answer = json.loads(body)
        return int(head.split(" ", 2)[1]), answer if isinstance(answer, dict) else {"answer": answer}
    except (ValueError, IndexError, asyncio.IncompleteReadError):
        raise Refused("502 Bad Gateway", f"{engine.host}:{engine.port} gave no JSON answer") from None
    finally:
        writer.close()


def _joined(body: bytes) -> bytes:
    """A chunked body in one piece."""
    out, rest = b"", body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        out, rest = out + rest[:length], rest[length + 2 :]
        if not length:
            break
    return out


async def _relay(
    engine: Engine, method: str, path: str, headers: dict[str, str], body: bytes, to: asyncio.StreamWriter
) -> None:
    """Passes an engine's answer on, byte by byte as it comes."""
    reader, writer = await _send(engine, method, path, headers, body)
    try:
        while piece := await reader.read(1 << 16):
            to.write(piece)
            await to.drain()
    finally:
        writer.close()


def _answer(status: str, content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return (head + "connection: close\r\n\r\n").encode() + body


async def _main(port: int, at: dict[str, str]) -> None:
    listed = json.loads(Path(__file__).with_name("router.json").read_text(encoding="utf-8"))
    router = Router(listed["routes"], at, listed.get("policy", "least_loaded"))
    server = await asyncio.start_server(router.handle, "0.0.0.0", port, limit=LONGEST_HEAD)
    print(f"listening on port {port}", file=sys.stderr)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--port", type=int, default=9000)
    arguments.add_argument("--at", nargs="*", default=[], metavar="NODE=ADDRESS", help="where nodes are")
    given = arguments.parse_args()
    asyncio.run(_main(given.port, dict(pair.split("=", 1) for pair in given.at)))
