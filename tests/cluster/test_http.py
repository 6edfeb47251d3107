import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from cluster.doors.both import listen
from cluster.doors.http import HttpDoor, HttpSettings
from cluster.doors.http_protocol import bounded_http
from cluster.doors.limits import HttpLimits
from cluster.doors.openai import ChatBody, CompletionBody, DetokenizeBody, parse_body
from cluster.doors.openai_replies import ChatChunk, ChatReply, CompletionReply
from cluster.gateway.call import RequestLimits
from cluster.gateway.settings import GatewaySettings
from engine.errors import BadRequest
from engine.request import Request, Sampling
from placement.routing.admission import AdmissionSettings
from tests.cluster.fakes import hash_tokens
from tests.cluster.serving import FakeCluster, running, says, settle, tokens_of, until


@asynccontextmanager
async def serving(*names, settings=None, http=None, **options):
    names = names or ("prefill-0", "decode-0")
    async with running(*names, settings=settings, **options) as cluster:
        door = HttpDoor(cluster.gateway, http)
        transport = httpx.ASGITransport(door.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            client.cluster, client.door = cluster, door
            yield client


def events(response) -> list[dict | str]:
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


COMPLETION = {"model": "fake", "prompt": "hello", "seed": 7, "max_tokens": 8, "ignore_eos": True}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


async def test_a_completion_has_openais_shape_and_usage():
    async with serving(draw=says("hello there")) as client:
        response = await client.post("/v1/completions", json=COMPLETION | {"max_tokens": 5})
        reply = CompletionReply.model_validate(response.json())
        assert reply.choices[0].text == "hello"
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.model_dump() == {
            "prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10,
        }  # fmt: skip
        assert response.headers["x-request-id"] == reply.id
        await settle()
        client.cluster.assert_empty()


async def test_a_stream_has_one_chunk_a_token_and_ends_with_usage():
    async with serving() as client:
        body = COMPLETION | {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post("/v1/completions", json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = events(response)
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 8
        assert len(chunks) == 8
        for chunk in chunks:
            CompletionReply.model_validate(chunk)
            assert chunk["usage"] is None
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 7 + ["length"]


async def test_usage_can_be_had_on_every_chunk():
    async with serving() as client:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = COMPLETION | {"stream": True, "stream_options": options, "max_tokens": 3}
        *chunks, _ = events(await client.post("/v1/completions", json=body))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == [1, 2, 3, 3]


async def test_the_answers_limit_has_two_names():
    async with serving() as client:
        for name in ("max_tokens", "max_completion_tokens"):
            body = {"prompt": "hello", "ignore_eos": True, name: 3}
            reply = (await client.post("/v1/completions", json=body)).json()
            assert reply["usage"]["completion_tokens"] == 3
        reply = (
            await client.post("/v1/completions", json={"prompt": "x", "ignore_eos": True})
        ).json()
        assert reply["usage"]["completion_tokens"] == 16


async def test_chat_streams_its_role_once_and_then_content():
    async with serving(draw=says("hey")) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        *chunks, _ = events(response)
        for chunk in chunks:
            ChatChunk.model_validate(chunk)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": "h"}
        assert deltas[1] == {"content": "e"}
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_chat_reply_with_logprobs():
    async with serving(draw=says("hey")) as client:
        body = CHAT | {"logprobs": True, "top_logprobs": 2}
        reply = ChatReply.model_validate(
            (await client.post("/v1/chat/completions", json=body)).json()
        )
        content = reply.choices[0].logprobs.content
        assert [entry.token for entry in content[:3]] == ["h", "e", "y"]
        assert len(content[0].top_logprobs) == 2
        assert content[0].bytes == [104]
        assert reply.choices[0].message.content == "hey"


async def test_completion_logprobs_streamed_and_whole_agree():
    async with serving(draw=says("hey")) as client:
        body = COMPLETION | {"logprobs": 1, "max_tokens": 3}
        whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
        assert whole["tokens"] == ["h", "e", "y"]
        assert whole["text_offset"] == [0, 1, 2]
        chunks = events(await client.post("/v1/completions", json=body | {"stream": True}))[:-1]
        pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert {key: [one for p in pieces for one in p[key]] for key in whole} == whole


async def test_several_prompts_and_answers_are_numbered():
    async with serving(draw=says("x")) as client:
        body = {"prompt": ["a", "bc"], "n": 2, "max_tokens": 3, "echo": True}
        reply = (await client.post("/v1/completions", json=body)).json()
        assert [c["text"] for c in reply["choices"]] == ["ax", "ax", "bcx", "bcx"]
        assert reply["usage"]["prompt_tokens"] == 3


async def test_token_ids_are_prompts_too():
    async with serving(draw=says("x")) as client:
        reply = await client.post(
            "/v1/completions", json={"prompt": tokens_of("abc"), "echo": True}
        )
        assert reply.json()["choices"][0]["text"] == "abcx"


async def test_the_request_id_is_the_callers():
    async with serving() as client:
        headers = {"x-request-id": "my-id"}
        response = await client.post("/v1/completions", json=COMPLETION, headers=headers)
        assert response.json()["id"] == response.headers["x-request-id"] == "my-id"


async def test_tokens_and_text_go_both_ways():
    async with serving() as client:
        tokens = (await client.post("/tokenize", json={"prompt": "héllo"})).json()
        assert tokens["count"] == len(tokens["tokens"]) == 6
        back = await client.post("/detokenize", json={"tokens": tokens["tokens"]})
        assert back.json() == {"prompt": "héllo"}
        chat = await client.post("/tokenize", json={"messages": CHAT["messages"]})
        assert chat.json()["tokens"] == tokens_of("<user>hi<assistant>")


async def test_texts_are_as_long_as_prompts_may_be():
    limits = RequestLimits(prompt_characters=10)
    async with serving(settings=GatewaySettings(limits)) as client:
        for body in ({"prompt": "x" * 11}, {"messages": CHAT["messages"] * 2}):
            response = await client.post("/tokenize", json=body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] in body


LARGE = [
    ("/v1/completions", COMPLETION | {"n": 2}, "n"),
    ("/v1/completions", COMPLETION | {"prompt": ["x", "y"]}, "prompt"),
    ("/v1/completions", COMPLETION | {"stop": ["x", "y"]}, "stop"),
    ("/v1/completions", COMPLETION | {"stop": "xy"}, "stop"),
    ("/v1/completions", COMPLETION | {"stop_token_ids": [1, 2]}, "stop_token_ids"),
    ("/v1/completions", COMPLETION | {"logit_bias": {"1": 1, "2": 1}}, "logit_bias"),
    ("/v1/completions", COMPLETION | {"logprobs": 2}, "logprobs"),
    ("/v1/chat/completions", CHAT | {"messages": CHAT["messages"] * 2}, "messages"),
    ("/tokenize", {"messages": CHAT["messages"] * 2}, "messages"),
]


@pytest.mark.parametrize(("path", "body", "param"), LARGE)
async def test_a_config_may_allow_less_than_is_usual(path, body, param):
    names = ("n", "prompts", "stops", "stop_characters", "stop_token_ids", "logit_bias", "logprobs")
    limits = RequestLimits(**dict.fromkeys((*names, "chat_messages"), 1))
    async with serving(settings=GatewaySettings(limits)) as client:
        response = await client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_config_may_allow_more_than_is_usual():
    limits = RequestLimits(n=100, stops=100)
    async with serving(settings=GatewaySettings(limits)) as client:
        body = COMPLETION | {"n": 65, "stop": [f"<{n}>" for n in range(17)], "max_tokens": 1}
        reply = await client.post("/v1/completions", json=body)
        assert len(reply.json()["choices"]) == 65


async def test_models_and_health():
    async with serving(http=HttpSettings(model_root="/models/fake")) as client:
        card = (await client.get("/v1/models")).json()["data"][0]
        assert (card["id"], card["root"]) == ("fake", "/models/fake")
        assert (await client.get("/v1/models/fake")).json() == card
        assert (await client.get("/v1/models/other")).status_code == 404
        for path in ("/health", "/live", "/ready"):
            assert (await client.get(path)).status_code == 200
        client.cluster.gateway.draining = True
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/live")).status_code == 200


WRONG = [
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": 5}, 400, "prompt"),
    ("/v1/completions", {"prompt": [999]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 9999}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "temperature": 3}, 400, "temperature"),
    ("/v1/completions", {"prompt": "x", "temperature": "1"}, 400, "temperature"),
    ("/v1/completions", {"prompt": "x", "wrong": 1}, 400, "wrong"),
    ("/v1/completions", {"prompt": "x", "best_of": 4}, 400, "best_of"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "x", "model": "gpt-4"}, 404, "model"),
    ("/v1/completions", {"prompt": "x", "stream_options": {}}, 400, "stream_options"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"tools": [{}]}, 400, "tools"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"max_completion_tokens": 5}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "x"}}, 400, "response_format"),
    ("/tokenize", {}, 400, "prompt"),
    ("/detokenize", {"tokens": [999]}, 400, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), WRONG)
async def test_a_wrong_field_is_named_in_openais_shape(path, body, status, param):
    async with serving() as client:
        response = await client.post(path, json=body)
        assert response.status_code == status
        assert response.json()["error"]["param"] == param
        client.cluster.assert_empty()


MANY = 20_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": [0.5] * MANY}),
        (CompletionBody, {"prompt": [[0.5] * MANY]}),
        (CompletionBody, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(MANY)), "x")}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (DetokenizeBody, {"tokens": [-1] * MANY}),
    ],
    ids=["tokens", "lists of tokens", "biases", "parts of a message", "tokens to text"],
)
def test_of_many_wrong_items_not_each_is_told(kind, body):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 200


def test_a_body_in_which_nearly_everything_is_wrong_is_refused_as_a_whole():
    body = {"prompt": "x"} | dict.fromkeys(map(str, range(MANY)), 0)
    with pytest.raises(BadRequest) as caught:
        parse_body(CompletionBody, json.dumps(body).encode())
    assert (caught.value.field, caught.value.value) == ("body", MANY)


async def test_bodies_that_are_not_json_are_refused():
    async with serving() as client:
        for content in (b"", b"{", b"\xff", b'{"prompt": "\\ud800"}', b"[" * 10_000):
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == 400
            assert response.json()["error"]["type"] == "invalid_request_error"
        wrong_type = {"content-type": "text/plain"}
        response = await client.post("/v1/completions", content=b"{}", headers=wrong_type)
        assert response.status_code == 415


async def test_unknown_paths_and_methods_have_openais_shape():
    async with serving() as client:
        missing = await client.get("/v1/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        wrong = await client.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["code"] == "method_not_allowed"


async def test_a_body_over_the_limit_is_refused_declared_or_not():
    async with serving(http=HttpSettings(HttpLimits(body_bytes=100))) as client:
        assert (await client.post("/v1/completions", content=b"x" * 101)).status_code == 413

        async def parts():
            for _ in range(11):
                yield b"x" * 10

        response = await client.post("/v1/completions", content=parts())
        assert response.status_code == 413


async def test_a_body_that_does_not_arrive_times_out():
    async with serving(http=HttpSettings(HttpLimits(body_s=0.01))) as client:

        async def stuck():
            yield b"{"
            await asyncio.Event().wait()

        response = await client.post("/v1/completions", content=stuck())
        assert response.status_code == 408
        assert response.json()["error"]["code"] == "body_timeout"


async def test_overload_is_429_with_retry_after():
    settings = GatewaySettings(admission=AdmissionSettings(queue_requests=0))
    async with serving(settings=settings) as client:
        response = await client.post("/v1/completions", json=COMPLETION)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        client.cluster.assert_empty()


async def test_a_fault_of_our_own_has_openais_shape_and_tells_nothing():
    async with serving() as client:
        client.door._started_s = object()
        transport = httpx.ASGITransport(client.door.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as outside:
            response = await outside.get("/v1/models")
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal"


def scope() -> dict:
    return {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
        "headers": [], "http_version": "1.1", "root_path": "",
    }  # fmt: skip


async def test_a_disconnect_frees_every_holder():
    async with serving() as client:
        cluster: FakeCluster = client.cluster
        cluster.paused.add("decode-0")
        sent: list[dict] = []
        gone = asyncio.Event()
        parts = [
            {"type": "http.request", "body": json.dumps(COMPLETION | {"stream": True}).encode()}
        ]

        async def receive():
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        exchange = asyncio.create_task(client.door.app(scope(), receive, send))
        await until(lambda: cluster.instances["decode-0"].sequences)
        gone.set()
        await exchange
        assert sent[0]["status"] == 200
        await until(lambda: not cluster.instances["decode-0"].sequences)
        await until(lambda: not cluster.instances["prefill-0"].sequences)
        cluster.assert_empty()


async def test_a_closed_connection_frees_every_holder():
    async with serving() as client, listening(client.door.app) as url:
        cluster: FakeCluster = client.cluster
        cluster.paused.add("decode-0")
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        body = json.dumps(COMPLETION | {"stream": True})
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        await reader.readuntil(b"data: ")
        writer.close()
        await until(lambda: not cluster.gateway.requests())
        for instance in cluster.instances.values():
            await until(lambda one=instance: not one.sequences)


async def test_a_reader_that_stops_reading_is_cut_off():
    over = asyncio.Event()

    async def endless():
        try:
            while True:
                yield bytes(1 << 16)
                await asyncio.sleep(0)
        finally:
            over.set()

    app = Starlette(routes=[Route("/", lambda _: StreamingResponse(endless()))])
    async with listening(app, HttpLimits(write_s=0.01)) as url:
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await over.wait()
        writer.close()


async def test_a_failure_in_mid_stream_is_told_in_the_stream():
    async with serving("mixed-0", settings=GatewaySettings(request_s=0.0, sweep_s=30)) as client:
        cluster: FakeCluster = client.cluster
        body = COMPLETION | {"stream": True, "max_tokens": 1000}
        exchange = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: any(s.output_tokens for s in cluster.gateway.requests()))
        cluster.gateway.sweep()
        *_, last = events(await exchange)
        assert last["error"]["code"] == "deadline_exceeded"
        await until(lambda: not cluster.instances["mixed-0"].sequences)


async def test_a_shutdown_that_cannot_wait_is_told_in_the_answer_and_in_the_stream():
    async with serving("mixed-0") as client:
        gateway, body = client.cluster.gateway, COMPLETION | {"max_tokens": 1000}
        whole = asyncio.create_task(client.post("/v1/completions", json=body))
        stream = asyncio.create_task(client.post("/v1/completions", json=body | {"stream": True}))
        await until(lambda: [bool(one.output_tokens) for one in gateway.requests()] == [True] * 2)
        await gateway.drain(0.0)
        answer, (*_, last) = await whole, events(await stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert last["error"]["code"] == "deadline_exceeded"
        await until(lambda: not client.cluster.instances["mixed-0"].sequences)
        client.cluster.assert_empty()


@asynccontextmanager
async def listening(app, limits=None):
    http = bounded_http(limits or HttpLimits())
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="warning", lifespan="off"))
    sock = listen("127.0.0.1", 0, "port")
    task = asyncio.create_task(server.serve([sock]))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def test_the_openai_package_talks_to_it():
    from openai import AsyncOpenAI, BadRequestError, NotFoundError

    async with serving() as plain, listening(plain.door.app) as url:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        async with client:
            assert (await client.models.list()).data[0].id == "fake"
            stream = await client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "hi"}], max_tokens=5,
                stream=True, seed=3, logprobs=True, top_logprobs=2,
                stream_options={"include_usage": True},
            )  # fmt: skip
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage.completion_tokens == 5
            several = await client.completions.create(
                model="fake", prompt="hi", n=3, max_tokens=4, stop=["zzz"], seed=5, temperature=0.5,
            )  # fmt: skip
            assert len({choice.text for choice in several.choices}) > 1
            with pytest.raises(BadRequestError) as caught:
                await client.completions.create(model="fake", prompt="hi", temperature=9)
            assert caught.value.param == "temperature"
            with pytest.raises(NotFoundError):
                await client.completions.create(model="other", prompt="hi")


async def test_the_same_seed_gives_the_same_tokens_as_the_instances_draw():
    async with serving() as client:
        body = COMPLETION | {"logprobs": 0}
        reply = (await client.post("/v1/completions", json=body)).json()
        sampling = Sampling(max_tokens=8, seed=7)
        expected = hash_tokens(Request("x", tuple(tokens_of("hello")), sampling))
        token_text = client.cluster.gateway.tokenizer.token_text
        assert reply["choices"][0]["logprobs"]["tokens"] == [token_text(t) for t in expected]
