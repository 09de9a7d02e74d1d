"""The router of a bundle, before stand-ins for engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from planc.codegen.engines.router import BLOCK, POLICIES, Engine, Router, first_token_only, prefix_blocks
from planc.planner.routing import POLICIES as PLANNED

TICKET = {"do_remote_prefill": True, "remote_engine_id": "a", "remote_block_ids": [[1, 2]]}


class Stub:
    """Answers every request with what `answer` makes of it, in chunks, and notes what it got."""

    def __init__(self, answer: Callable[[dict[str, Any]], list[str]], status: str = "200 OK") -> None:
        self.answer, self.status = answer, status
        self.got: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.gate: asyncio.Event | None = None

    async def start(self) -> int:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        asked = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.got.append((headers, asked))
        if self.gate:
            await self.gate.wait()
        writer.write(f"HTTP/1.1 {self.status}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for piece in self.answer(asked):
            writer.write(f"{len(piece):x}\r\n{piece}\r\n".encode())
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        writer.close()


def prefill(status: str = "200 OK") -> Stub:
    return Stub(lambda asked: ['{"kv_transfer', f'_params": {json.dumps(TICKET)}}}'], status)


def decode() -> Stub:
    return Stub(lambda asked: ["data: one\n\n", "data: two\n\n"])


def listed(port: int, share: float = 1.0) -> dict[str, Any]:
    return {"node": "n0", "port": port, "share": share}


async def ask(router: Router, body: bytes, headers: str = "") -> tuple[int, str]:
    server = await asyncio.start_server(router.handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    writer.write(head.encode() + body)
    answer = (await reader.read()).decode()
    writer.close()
    server.close()
    return int(answer.split(" ")[1]), answer.partition("\r\n\r\n")[2]


def run(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 20))  # type: ignore[arg-type]


REQUEST = json.dumps({"prompt": "x", "max_tokens": 7, "stream": True, "stream_options": {"a": 1}}).encode()


def test_a_request_is_prefilled_then_decoded_and_streamed() -> None:
    async def scene() -> None:
        first, second = prefill(), decode()
        route = {
            "classes": [],
            "prefill": [listed(await first.start())],
            "decode": [listed(await second.start())],
        }
        status, text = await ask(Router([route], {"n0": "127.0.0.1"}), REQUEST)
        assert (status, text.count("data: ")) == (200, 2)
        (headers, asked), (later, given) = first.got[0], second.got[0]
        assert (asked["max_tokens"], asked["stream"]) == (1, False)
        assert asked["kv_transfer_params"]["do_remote_decode"] is True
        assert "stream_options" not in asked
        assert given == {**json.loads(REQUEST), "kv_transfer_params": TICKET}
        assert headers["x-request-id"] == later["x-request-id"]

    run(scene)


def test_requests_go_by_share_and_by_class() -> None:
    async def scene() -> None:
        small, large, other = decode(), decode(), decode()
        for stub in (small, large):
            stub.gate = asyncio.Event()
        ports = [await stub.start() for stub in (small, large, other)]
        routes = [
            {"classes": ["chat"], "whole": [listed(ports[0], 0.2), listed(ports[1], 0.6)]},
            {"classes": ["code"], "whole": [listed(ports[2], 0.2)]},
        ]
        router = Router(routes, {"n0": "127.0.0.1"})
        chats = [asyncio.create_task(ask(router, b"{}", "X-Traffic-Class: chat\r\n")) for _ in range(8)]
        assert await ask(router, b"{}", "X-Traffic-Class: code\r\n") == (
            200,
            "b\r\ndata: one\n\n\r\nb\r\ndata: two\n\n\r\n0\r\n\r\n",
        )
        while len(small.got) + len(large.got) < 8:
            await asyncio.sleep(0.01)
        assert (len(small.got), len(large.got), len(other.got)) == (2, 6, 1)
        for stub in (small, large):
            assert stub.gate
            stub.gate.set()
        assert {status for status, _ in await asyncio.gather(*chats)} == {200}
        status, _ = await ask(router, b"{}", "X-Traffic-Class: video\r\n")
        assert status == 404

    run(scene)


def test_failures_are_answers() -> None:
    async def scene() -> None:
        broken, second = prefill("503 Busy"), decode()
        route = {
            "classes": [],
            "prefill": [listed(await broken.start())],
            "decode": [listed(await second.start())],
        }
        at = {"n0": "127.0.0.1"}
        assert (await ask(Router([route], at), REQUEST))[0] == 503
        assert second.got == []
        assert (await ask(Router([route], at), b"not json"))[0] == 400
        assert (await ask(Router([route], at), b"[1]"))[0] == 400
        gone = {"classes": [], "whole": [listed(1)]}
        assert (await ask(Router([gone], at), b"{}"))[0] == 502

    run(scene)


def test_chat_requests_state_their_limit_in_their_own_word() -> None:
    found = first_token_only({"messages": [], "max_completion_tokens": 50, "min_tokens": 9})
    assert (found["max_completion_tokens"], found["max_tokens"], found["min_tokens"]) == (1, 1, 1)


def test_text_that_was_seen_goes_where_it_was_unless_too_much_waits_there() -> None:
    policy, engines = POLICIES["prefix_aware"](), [Engine("a", 1, 0.5, 1 << 14), Engine("b", 2, 0.5, 1 << 14)]
    long, other = (
        prefix_blocks({"messages": [{"role": "system", "content": word * BLOCK}]})
        for word in ("one ", "two ")
    )
    first = policy.choose(engines, long)
    first.open, first.waiting = 1, len(long)
    second = policy.choose(engines, other)
    assert second is not first
    second.open, second.waiting = 1, len(other)
    assert policy.choose(engines, long) is first
    assert policy.choose(engines, other) is second
    first.waiting = 3 * len(long)
    assert policy.choose(engines, long) is second


def test_what_a_cache_cannot_hold_any_more_is_forgotten() -> None:
    policy, engine = POLICIES["prefix_aware"](), Engine("a", 1, 1.0, cache_tokens=BLOCK)
    for number in range(9):
        policy.choose([engine], prefix_blocks({"prompt": f"{number} " * 4 * BLOCK}))
    assert len(engine.seen) == engine.most


@pytest.mark.parametrize("name", PLANNED)
def test_every_policy_of_a_plan_heeds_shares(name: str) -> None:
    small, large = Engine("a", 1, 0.25), Engine("b", 2, 0.75)
    policy = POLICIES[name]()
    for _ in range(40):
        chosen = policy.choose([small, large], [b""])
        chosen.open += 1
        chosen.waiting += 1
    assert 8 <= small.open <= 12
    assert set(PLANNED) == set(POLICIES)
