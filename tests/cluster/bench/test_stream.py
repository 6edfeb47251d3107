"""What the client makes of the bytes a server sends."""

from __future__ import annotations

import asyncio

import pytest

from cluster.bench.http import Client, ConnectionClosed, HttpRefused, parse_target
from cluster.bench.sse import LARGEST_EVENT_BYTES, Answer, BadStream, EventSplitter
from engine.errors import BadInput, TransportError
from tests.cluster.bench.simulated import Behaviour, SimulatedServer


def test_events_cut_at_any_byte_come_out_whole() -> None:
    stream = b'data: {"a": 1}\n\n: comment\n\ndata: one\ndata: two\r\n\r\ndata: [DONE]\n\n'
    splitter = EventSplitter()
    events = [event for byte in stream for event in splitter.feed(bytes([byte]))]
    assert events == [b'{"a": 1}', b"one\ntwo", b"[DONE]"]


def test_an_endless_event_is_refused() -> None:
    with pytest.raises(BadStream, match="more than"):
        EventSplitter().feed(b"data: " + b"x" * LARGEST_EVENT_BYTES)


@pytest.mark.parametrize("keep_text", [True, False])
def test_only_chunks_with_a_token_count(keep_text: bool) -> None:
    answer = Answer(keep_text=keep_text)
    for number, event in enumerate(
        (
            b'{"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason":null}]}',
            b'{"choices": [{"delta": {"content": "a"}, "finish_reason":null}]}',
            b'{"choices": [{"text": "", "finish_reason": null}]}',
            b'{"choices": [{"text": "", "finish_reason": "stop"}]}',
            b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}',
            b"[DONE]",
        )
    ):
        answer.take(event, float(number))
    assert answer.token_s == [1.0, 2.0]
    assert (answer.prompt_tokens, answer.output_tokens, answer.ended) == (5, 2, True)


def test_an_error_in_the_stream_is_kept() -> None:
    answer = Answer()
    answer.take(b'{"error": {"message": "the instance is gone"}}', 0.0)
    assert answer.error == "the instance is gone"


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("http://h:1/v1/", "http://h:1"),
        ("https://h/api/v1", "https://h:443/api"),
    ],
)
def test_base_urls_with_or_without_v1(url: str, base: str) -> None:
    assert parse_target(url).url == base


def test_a_url_without_a_host_is_named() -> None:
    with pytest.raises(BadInput, match="url"):
        parse_target("http://")


async def one_reply(reply: bytes) -> tuple[Client, asyncio.Server]:
    """A server that gives the same bytes to everyone and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    return Client(parse_target(f"127.0.0.1:{port}")), server


async def test_an_answer_may_end_with_the_connection() -> None:
    client, server = await one_reply(b"HTTP/1.1 200 OK\r\n\r\nall of it")
    assert await client.fetch("GET", "/") == b"all of it"
    server.close()


async def test_an_answer_cut_short_is_an_error() -> None:
    client, server = await one_reply(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf")
    with pytest.raises(ConnectionClosed):
        await client.fetch("GET", "/")
    server.close()


async def test_what_is_not_http_is_an_error() -> None:
    client, server = await one_reply(b"SSH-2.0-OpenSSH\r\n\r\n")
    with pytest.raises(BadStream, match="not HTTP"):
        await client.fetch("GET", "/")
    server.close()


async def test_an_error_status_carries_the_servers_words() -> None:
    body = b'{"error": {"message": "too long"}}'
    head = b"HTTP/1.1 400 Bad\r\ncontent-length: %d\r\n\r\n" % len(body)
    client, server = await one_reply(head + body)
    with pytest.raises(HttpRefused, match="HTTP 400: too long"):
        await client.fetch("GET", "/")
    server.close()


async def test_nobody_listening_is_an_error() -> None:
    client, server = await one_reply(b"")
    server.close()
    await server.wait_closed()
    with pytest.raises(TransportError, match=r"127\.0\.0\.1"):
        await client.fetch("GET", "/")


async def test_an_idle_connection_that_the_server_closed_is_replaced() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    client, server = await one_reply(head)
    assert [await client.fetch("GET", "/") for _ in range(3)] == [b"ok"] * 3
    client.close()
    server.close()


async def test_connections_are_used_again() -> None:
    server = SimulatedServer(Behaviour())
    client = Client(parse_target(await server.start()))
    for _ in range(3):
        await client.fetch("GET", "/v1/models")
    assert server.connections == 1
    client.close()
    server.close()
