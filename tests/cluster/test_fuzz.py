"""Whatever is sent, the answer is a typed refusal or a right answer, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import contextmanager

import grpc
import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from cluster.doors.both import listen
from cluster.doors.grpc_door import GrpcDoor
from cluster.doors.http import HttpDoor, HttpSettings
from cluster.doors.http_protocol import bounded_http
from cluster.doors.limits import HttpLimits
from cluster.doors.openapi import openapi_document
from cluster.rpc import tandem_pb2 as pb
from engine.grammar import GrammarCompiler
from tests.cluster.serving import PATIENCE_S, TOKENIZER, running
from tests.cluster.test_grpc import FakeOperator

CHECKS = (
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
)
SCHEMA = schemathesis.openapi.from_dict(openapi_document(with_keys=False))
# A body over the limit is refused before anyone looks at what is wrong inside it.
SCHEMA.config.checks.negative_data_rejection.expected_statuses.append("413")
FUZZED = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
SOON_S = 0.2


class Served:
    """Both doors of a fake cluster, on a thread with its own loop."""

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self.listener = listen("127.0.0.1", 0, "port")
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        # A connection that idles is closed by the server, perhaps just when it is used again.
        alone = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S, limits=alone)
        self.grpc_port = 0
        self.left: list = []
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    def close(self) -> None:
        self.client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        grammars = GrammarCompiler(TOKENIZER)
        names = ("prefill-0", "decode-0")
        async with running(*names, grammars=grammars, context_tokens=48) as cluster:
            limits = HttpLimits(body_bytes=100_000, body_s=self._within_s, head_s=self._within_s)
            door = HttpDoor(cluster.gateway, HttpSettings(limits))
            config = uvicorn.Config(
                door.app, http=bounded_http(limits), lifespan="off", log_level="critical"
            )
            server = uvicorn.Server(config)
            grpc_door = GrpcDoor(cluster.gateway, FakeOperator(), port=0)
            await grpc_door.start()
            self.grpc_port = grpc_door.port
            task = asyncio.create_task(server.serve([self.listener]))
            self._ready.set()
            await self._stop.wait()
            server.should_exit = True
            await task
            await grpc_door.stop(0.0)
            self.left = cluster.gateway.requests()
            self.left += [one for held in cluster.instances.values() for one in held.sequences]


@contextmanager
def served(within_s=PATIENCE_S):
    """`within_s` is what a client may take over a head or a body."""
    server = Served(within_s)
    try:
        yield server
    finally:
        server.close()
    assert server.left == [], "requests outlived their clients"


@pytest.fixture(scope="module")
def server():
    with served() as one:
        yield one


OPERATIONS = [
    (path, method, mode)
    for path, verbs in SCHEMA.raw_schema["paths"].items()
    for method, operation in verbs.items()
    for mode in schemathesis.GenerationMode
    if mode is schemathesis.GenerationMode.POSITIVE or "requestBody" in operation
]


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_http_answers_as_its_openapi_document_says(server, path, method, mode):
    operation = SCHEMA[path][method.upper()]

    @FUZZED
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case):
        case.call_and_validate(base_url=server.url, checks=list(CHECKS), timeout=PATIENCE_S)

    fuzz()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner),
    max_leaves=10,
)
FIELDS = sorted(SCHEMA.raw_schema["components"]["schemas"]["CompletionBody"]["properties"])


@FUZZED
@given(changes=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3))
def test_any_value_in_any_field_is_answered_or_refused(server, changes):
    body = json.dumps({"prompt": "hi", "max_tokens": 2} | changes).encode("utf-8", "surrogatepass")
    headers = {"content-type": "application/json"}
    response = server.client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code in (200, 400, 404, 429)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@FUZZED
@given(body=st.binary(max_size=200))
def test_any_bytes_are_refused(server, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert server.client.post(path, content=body).status_code == 400


REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"content-length: 1000\r\n\r\n{"
)


def talk(server: Served, sent: bytes) -> bytes:
    """What the server says to a client that sends this and then only listens."""
    host, port = server.listener.getsockname()
    with socket.create_connection((host, port), timeout=PATIENCE_S) as connection:
        connection.sendall(sent)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_a_slow_body_is_cut_off():
    with served(SOON_S) as server:
        assert talk(server, REQUEST).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_goes_on_after_its_answer_does_not_keep_the_connection():
    head = REQUEST.replace(b"application/json", b"text/plain")
    with served(SOON_S) as server:
        host, port = server.listener.getsockname()
        with socket.create_connection((host, port), timeout=PATIENCE_S) as connection:
            connection.sendall(head)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 415 ")
            connection.sendall(b" ")
            assert connection.recv(65536) == b""


def test_a_truncated_body_frees_its_connection():
    with served() as server:
        host, port = server.listener.getsockname()
        with socket.create_connection((host, port)) as connection:
            connection.sendall(REQUEST)
        assert server.client.get("/live").status_code == 200


def test_an_oversized_body_is_refused_before_it_is_read():
    with served() as server:
        head = REQUEST.replace(b"1000", b"1000000")
        assert talk(server, head).startswith(b"HTTP/1.1 413 ")


def test_what_is_not_http_is_refused_in_the_same_shape():
    with served() as server:
        answer = talk(server, b"\x00\xff\x00 nonsense\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_head_that_does_not_end_is_cut_off_by_time_and_by_size():
    with served(SOON_S) as server:
        assert talk(server, b"POST / HTTP/1.1\r\nhost: ").startswith(b"HTTP/1.1 408 ")
        assert talk(server, b"").startswith(b"HTTP/1.1 408 ")
    with served() as server:
        endless = b"GET / HTTP/1.1\r\n" + b"x-a: b\r\n" * (HttpLimits().head_bytes // 8)
        assert talk(server, endless).startswith(b"HTTP/1.1 431 ")


def test_what_follows_a_chunked_body_is_ignored():
    with served() as server:
        head = REQUEST.partition(b"content-length")[0]
        head += b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        body = b'{"prompt": "a", "max_tokens": 1}'
        chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\nx-after: 1\r\n\r\n"
        assert talk(server, head + chunk).startswith(b"HTTP/1.1 200 ")


CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def call_raw(server: Served, method: str, message: bytes) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_stream(f"/tandem.v1.Inference/{method}")(message, timeout=PATIENCE_S)
        try:
            list(call)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


scalars = {
    "max_tokens": st.integers(0, 2**32 - 1),
    "min_tokens": st.integers(0, 2**32 - 1),
    "temperature": st.floats(),
    "top_p": st.floats(),
    "top_k": st.integers(0, 2**32 - 1),
    "min_p": st.floats(),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop_token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=3),
    "logprobs": st.integers(0, 2**32 - 1),
    "presence_penalty": st.floats(),
    "repetition_penalty": st.floats(),
    "logit_bias": st.dictionaries(st.integers(0, 2**32 - 1), st.floats(), max_size=3),
    "grammar": st.builds(pb.Grammar, kind=st.sampled_from(["regex", "json_schema", "choice", "?"]),
                         text=st.text(max_size=20)),
}  # fmt: skip
samplings = st.fixed_dictionaries({}, optional=scalars).map(lambda given: pb.Sampling(**given))
requests = st.fixed_dictionaries(
    {"sampling": samplings},
    optional={
        "request_id": st.text(max_size=5),
        "model": st.sampled_from(["", "fake", "other"]),
        "n": st.integers(0, 2**32 - 1),
        "stop": st.lists(st.text(max_size=3), max_size=3),
        "echo": st.booleans(),
        "priority": st.integers(-(2**31), 2**31 - 1),
        "slo_ttft_s": st.floats(),
    },
)
messages = st.builds(
    pb.ChatMessage, role=st.sampled_from(["user", "x"]), content=st.text(max_size=9)
)
prompts = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=60)}),
    st.fixed_dictionaries(
        {"tokens": st.builds(pb.TokenIds, ids=st.lists(st.integers(0, 300), max_size=60))}
    ),
    st.fixed_dictionaries(
        {"chat": st.builds(pb.Chat, messages=st.lists(messages, max_size=2))}
    ),
    st.just({}),
)  # fmt: skip


@FUZZED
@given(given_=requests, prompt=prompts)
def test_any_protobuf_gets_a_typed_status(server, given_, prompt):
    message = pb.GenerateRequest(**given_, **prompt).SerializeToString()
    assert call_raw(server, "Generate", message) in CODES


@FUZZED
@given(message=st.binary(max_size=100))
def test_any_bytes_over_grpc_get_a_status(server, message):
    # What does not decode never reaches the door: gRPC itself answers INTERNAL.
    allowed = CODES | {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    assert call_raw(server, "Generate", message) in allowed
