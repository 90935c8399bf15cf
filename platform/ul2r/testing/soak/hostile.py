"""Requests that no client should send: broken bodies, and connections that break HTTP's rules."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ul2r.testing.soak.cases import Case

HALF_CLOSE = None
"""Among the pieces of a script: nothing more is sent, and answers are still read."""
JSON_HEADERS = {"content-type": "application/json"}
BAD_BODIES: tuple[tuple[str, bytes], ...] = (
    ("/v1/completions", b""),
    ("/v1/completions", b"{"),
    ("/v1/completions", b'{"prompt": "a"'),
    ("/v1/completions", b"\xff\xfe{}"),
    ("/v1/completions", b"null"),
    ("/v1/completions", b"[1, 2]"),
    ("/v1/completions", b"[" * 100_000),
    ("/v1/completions", b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    ("/v1/completions", b'{"prompt": {"a": 1}}'),
    ("/v1/completions", b'{"prompt": "\\ud800"}'),
    ("/v1/completions", b'{"prompt": ""}'),
    ("/v1/completions", b'{"prompt": []}'),
    ("/v1/completions", b'{"prompt": [-1]}'),
    ("/v1/completions", b'{"prompt": [99999999999999999999]}'),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": 1e400}'),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -5}'),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}'),
    ("/v1/completions", b'{"prompt": "a", "temperature": -1}'),
    ("/v1/completions", b'{"prompt": "a", "top_p": Infinity}'),
    ("/v1/completions", b'{"prompt": "a", "n": 100000}'),
    ("/v1/completions", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"x": 1}}'),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"5": 1e9}}'),
    ("/v1/completions", b'{"prompt": "a", "stop": [""]}'),
    ("/v1/completions", b'{"prompt": "a", "echo": true, "logprobs": 1, "prefix_tokens": 9}'),
    ("/v1/completions", b'{"prompt": "' + b"a " * 5_000 + b'"}'),
    ("/v1/completions", json.dumps({"prompt": ["a"] * 250, "n": 120}).encode()),
    ("/v1/completions", b'{"prompt": "a", "timeout_s": 0}'),
    ("/v1/chat/completions", b'{"messages": []}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}'),
    ("/v1/infill", b'{"prompt": "no slot"}'),
    ("/v1/infill", b'{"prompt": "' + b"a<slot>" * 500 + b'"}'),
    ("/v1/infill", b'{"prompt": "<slot><slot>"}'),
    ("/infill", b'{"input_prefix": 5}'),
    ("/infill", b'{"input_prefix": "", "input_suffix": ""}'),
    ("/tokenize", b'{"prompt": null}'),
    ("/detokenize", b'{"tokens": [1e3]}'),
    ("/nowhere/../v1", b"{}"),
)
"""Each gets 4xx with OpenAI's error object."""


@dataclass(frozen=True)
class Script:
    """Pieces that are sent over one connection, and the answers to them.

    Attributes:
        name: Name, for reports.
        pieces: Bytes; pauses in seconds; `HALF_CLOSE`.
        statuses: Statuses that the answers must have in order. With `may_close` fewer may come, of those below 500.
        may_close: True if the server may also end the connection, or wait for the rest of what is sent.
    """

    name: str
    pieces: Sequence[bytes | float | None]
    statuses: tuple[int, ...] = ()
    may_close: bool = False


def make_scripts(case: Case) -> list[Script]:
    """Return scripts around a request: some that must be answered with 200, and some that break rules."""
    body = json.dumps(case.body).encode()
    line = (
        b"POST "
        + case.path.encode()
        + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    )
    length = b"content-length: %d\r\n" % len(body)
    request = line + length + b"\r\n" + body
    bad = line + b"content-length: 1\r\n\r\n{"
    chunks = (
        b"".join(b"%x\r\n%s\r\n" % (1, body[i : i + 1]) for i in range(len(body))) + b"0\r\n\r\n"
    )
    step = max(1, len(request) // 12)
    slow: list[bytes | float | None] = []
    for start in range(0, len(request), step):
        slow += [request[start : start + step], 0.1]
    return [
        Script("slow sender", slow, (200,)),
        Script("pipelined", [request * 3], (200, 200, 200)),
        Script("pipelined with a mistake", [request + bad + request], (200, 400, 200)),
        Script("chunked", [line + b"transfer-encoding: chunked\r\n\r\n" + chunks], (200,)),
        Script("expect", [line + length + b"expect: 100-continue\r\n\r\n", 0.2, body], (200,)),
        Script("HTTP/1.0", [request.replace(b"HTTP/1.1", b"HTTP/1.0")], (200,)),
        Script("half-closed", [request, HALF_CLOSE], may_close=True),
        Script("nothing", [], may_close=True),
        Script("head alone", [line + length + b"\r\n", 0.5], may_close=True),
        Script("half a body", [request[:-5], 0.5], may_close=True),
        Script("half a body, half-closed", [request[:-5], HALF_CLOSE], may_close=True),
        Script("half a line", [b"POST /v1/compl", 0.5], may_close=True),
        Script("no HTTP", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n"], may_close=True),
        Script("large header", [line + b"x-a: " + b"a" * 200_000 + b"\r\n" + length + b"\r\n" + body], may_close=True),
        Script("many headers", [line + b"x-a: a\r\n" * 5_000 + length + b"\r\n" + body], may_close=True),
        Script("negative length", [line + b"content-length: -1\r\n\r\n" + body], may_close=True),
        Script("two lengths", [line + length + b"content-length: 3\r\n\r\n" + body], may_close=True),
        Script("length and chunks", [line + length + b"transfer-encoding: chunked\r\n\r\n" + body], may_close=True),
        Script("bad chunk", [line + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + body], may_close=True),
        Script("bad name of a header", [line + b"a b\x00: c\r\n" + length + b"\r\n" + body], may_close=True),
    ]  # fmt: skip


async def play(port: int, script: Script, patience_s: float) -> list[tuple[int, bytes]]:
    """Send a script to 127.0.0.1, and return status and body of each answer.

    Args:
        port: Port of the server.
        script: What to send.
        patience_s: Time to wait for each answer.

    Raises:
        TimeoutError: If answers are missing and the server does not end the connection, where it has to.
        ConnectionError: If it ends the connection, where it may not.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = list[tuple[int, bytes]]()
    try:
        for piece in script.pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            elif piece is HALF_CLOSE:
                writer.write_eof()
            else:
                await asyncio.sleep(piece)
        # A server may wait for the rest of what breaks the rules: so does nobody here.
        async with asyncio.timeout(2 if script.may_close else patience_s):
            for _ in range(len(script.statuses) or 1):
                answers.append(await _read_response(reader))
    except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
        if not script.may_close:
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionError(f"ended after {len(answers)} answers: {error!r}") from error
    finally:
        writer.close()
    return answers


async def _read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(" ", 2)[1])
    if status == 100:
        return await _read_response(reader)
    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    if "content-length" in headers:
        return status, await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding") != "chunked":
        return status, await reader.read()
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return status, body
