import asyncio
import json
import os
import ssl

import grpc
import httpx
import pytest
import uvicorn

from cluster.cli.app import run as tandem
from cluster.config import TlsConfig
from cluster.doors.both import listen
from cluster.doors.grpc_door import GrpcDoor
from cluster.doors.http import HttpDoor
from cluster.doors.keys import Bucket, Keyring, Unauthorized, hash_key, matches, new_key
from cluster.doors.tls import check_tls, exposure_warning, uvicorn_options
from cluster.rpc import tandem_pb2 as pb
from cluster.rpc import tandem_pb2_grpc as rpc
from engine.errors import BadConfig, Overloaded
from tests.cluster.certificates import Authority
from tests.cluster.serving import PATIENCE_S, running, settle, until
from tests.cluster.test_grpc import FakeOperator

ALICE, BOB, ADMIN = "tk-alice", "tk-bob", "tk-admin"


def write_keys(path, **changes) -> None:
    entries = [
        {"name": "alice", "tenant": "a", "hash": hash_key(ALICE), "priority": 5},
        {"name": "bob", "tenant": "b", "hash": hash_key(BOB), "requests_per_minute": 1},
        {"name": "admin", "tenant": "ops", "hash": hash_key(ADMIN), "operator": "true"},
    ]
    lines = ["keys:"]
    for entry in entries:
        lines += [f"- {{{', '.join(f'{k}: {v}' for k, v in (entry | changes).items())}}}"]
    path.write_text("\n".join(lines))


@pytest.fixture
def key_file(tmp_path):
    write_keys(tmp_path / "keys.yaml")
    return tmp_path / "keys.yaml"


def test_a_key_is_known_by_its_hash_alone(key_file):
    ring = Keyring(key_file, 0.0)
    assert ring.caller(ALICE, 0.0).tenant == "a"
    assert ring.caller(ALICE, 0.0) is ring.caller(ALICE, 1.0)
    assert ALICE not in key_file.read_text()
    for wrong in (None, "", "tk-nobody"):
        with pytest.raises(Unauthorized):
            ring.caller(wrong, 0.0)


def test_hashes_are_salted_and_new_keys_are_long():
    key = new_key()
    assert len(key) > 40
    assert hash_key(key) != hash_key(key)
    assert matches(key, hash_key(key))
    assert not matches("other", hash_key(key))


def test_a_changed_file_is_read_again_and_a_broken_one_keeps_the_keys(key_file):
    ring = Keyring(key_file, 0.0)
    ring.caller(ALICE, 0.0)
    key_file.write_text("keys: [")
    os.utime(key_file, (1, 1))
    assert ring.caller(ALICE, 10.0).tenant == "a"
    key_file.write_text("keys: []")
    os.utime(key_file, (2, 2))
    with pytest.raises(Unauthorized):
        ring.caller(ALICE, 20.0)


def test_an_unhashed_key_in_the_file_is_refused_and_not_shown(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [{name: x, tenant: t, hash: tk-secret}]")
    with pytest.raises(BadConfig) as caught:
        Keyring(path, 0.0)
    assert "tk-secret" not in str(caught.value)
    assert "keys.0.hash" in str(caught.value)


def test_a_bucket_fills_at_its_rate_and_can_be_overdrawn_once():
    bucket = Bucket(60.0, 0.0)
    assert bucket.wait_s(0.0) == 0.0
    bucket.take(90.0)
    assert bucket.wait_s(0.0) == pytest.approx(31.0)
    assert bucket.wait_s(31.5) == 0.0


def test_a_used_up_rate_is_overload(key_file):
    caller = Keyring(key_file, 0.0).caller(BOB, 0.0)
    caller.enter(0.0)
    with pytest.raises(Overloaded) as caught:
        caller.enter(1.0)
    assert caught.value.retry_after_s == pytest.approx(59.0)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def tls_of(authority: Authority, *, mutual: bool = False, days: int = 1) -> TlsConfig:
    certificate, key = authority.pair("server", days)
    return TlsConfig(certificate=certificate, key=key, client_ca=authority.path if mutual else None)


def test_loopback_needs_nothing_and_other_addresses_need_encryption_and_keys(authority):
    plain, mutual = tls_of(authority), tls_of(authority, mutual=True)
    for host in ("127.0.0.1", "localhost", "::1"):
        assert exposure_warning(host, None, keys=False, insecure=False) is None
    assert exposure_warning("0.0.0.0", plain, keys=True, insecure=False) is None
    assert exposure_warning("0.0.0.0", mutual, keys=False, insecure=False) is None
    for tls, keys in ((None, False), (None, True), (plain, False)):
        with pytest.raises(BadConfig, match="--insecure"):
            exposure_warning("0.0.0.0", tls, keys=keys, insecure=False)
        warning = exposure_warning("0.0.0.0", tls, keys=keys, insecure=True)
        assert warning.startswith("WARNING: 0.0.0.0 is reachable")


def test_tls_files_are_checked_before_serving(authority):
    check_tls(tls_of(authority, mutual=True))
    with pytest.raises(BadConfig, match="not valid now"):
        check_tls(tls_of(authority, days=-1))
    certificate, _ = authority.pair("one")
    _, other_key = authority.pair("two")
    with pytest.raises(BadConfig, match="does not belong"):
        check_tls(TlsConfig(certificate=certificate, key=other_key))
    with pytest.raises(BadConfig, match="cannot be read"):
        check_tls(TlsConfig(certificate=certificate.parent / "no.pem", key=other_key))


BODY = {"prompt": "hi", "max_tokens": 2}


async def test_http_asks_for_a_key_and_gives_its_tenant(key_file):
    async with running("mixed-0") as cluster:
        door = HttpDoor(cluster.gateway, keys=Keyring(key_file, 0.0))
        transport = httpx.ASGITransport(door.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert (await client.get("/v1/models")).status_code == 401
            assert (await client.get("/health")).status_code == 200
            alice = {"authorization": f"Bearer {ALICE}"}
            reply = await client.post("/v1/completions", json=BODY, headers=alice)
            assert reply.status_code == 200
            assert cluster.instances["mixed-0"].starts[0].request.tenant == "a"
            urgent = await client.post(
                "/v1/completions", json=BODY | {"priority": 6}, headers=alice
            )
            assert urgent.json()["error"]["param"] == "priority"
            bob = {"authorization": f"Bearer {BOB}"}
            assert (await client.post("/v1/completions", json=BODY, headers=bob)).status_code == 200
            assert (await client.post("/v1/completions", json=BODY, headers=bob)).status_code == 429


async def test_a_key_below_the_usual_priority_needs_not_say_so(tmp_path):
    path = tmp_path / "keys.yaml"
    write_keys(path, priority=-5)
    alice = {"authorization": f"Bearer {ALICE}"}
    async with running("mixed-0") as cluster:
        door = HttpDoor(cluster.gateway, keys=Keyring(path, 0.0))
        transport = httpx.ASGITransport(door.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            reply = await client.post("/v1/completions", json=BODY, headers=alice)
            assert reply.status_code == 200
            assert cluster.instances["mixed-0"].starts[0].request.priority == -5
            usual = BODY | {"priority": 0}
            reply = await client.post("/v1/completions", json=usual, headers=alice)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "priority")


async def test_what_an_answer_takes_counts_while_it_grows(tmp_path):
    path = tmp_path / "keys.yaml"
    write_keys(path, tokens_per_minute=10)
    headers = {"authorization": f"Bearer {ALICE}"}
    async with running("mixed-0") as cluster:
        keys, now = Keyring(path, 0.0), cluster.gateway.clock.now
        door = HttpDoor(cluster.gateway, keys=keys)
        transport = httpx.ASGITransport(door.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = BODY | {"max_tokens": 2000, "ignore_eos": True}
            reply = asyncio.create_task(client.post("/v1/completions", json=body, headers=headers))
            await until(lambda: any(one.output_tokens > 20 for one in cluster.gateway.requests()))
            cluster.paused.add("mixed-0")
            await settle()
            with pytest.raises(Overloaded, match="tokens per minute"):
                keys.caller(ALICE, now()).enter(now())
            cluster.resume("mixed-0")
            assert (await reply).status_code == 200


async def test_grpc_asks_for_a_key_and_lets_operators_operate(key_file):
    async with running("mixed-0") as cluster:
        keys = Keyring(key_file, 0.0)
        door = GrpcDoor(cluster.gateway, FakeOperator(), port=0, keys=keys)
        await door.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}") as channel:
                stub = rpc.ClusterStub(channel)
                codes = []
                for key in (None, ALICE, ADMIN):
                    metadata = None if key is None else (("authorization", f"Bearer {key}"),)
                    try:
                        await stub.Status(pb.StatusRequest(), metadata=metadata)
                        codes.append(grpc.StatusCode.OK)
                    except grpc.aio.AioRpcError as error:
                        codes.append(error.code())
                code = grpc.StatusCode
                assert codes == [code.UNAUTHENTICATED, code.PERMISSION_DENIED, code.OK]
        finally:
            await door.stop(0.0)


async def test_mutual_tls_on_http_turns_strangers_away(authority):
    tls = tls_of(authority, mutual=True)
    async with running("mixed-0") as cluster:
        listener = listen("127.0.0.1", 0, "port")
        config = uvicorn.Config(
            HttpDoor(cluster.gateway).app, lifespan="off", log_level="critical",
            **uvicorn_options(tls),
        )  # fmt: skip
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([listener]))
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/health"
        trust = ssl.create_default_context(cafile=str(authority.path))
        async with httpx.AsyncClient(verify=trust, timeout=PATIENCE_S) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.get(url)
        known = ssl.create_default_context(cafile=str(authority.path))
        known.load_cert_chain(*authority.pair("client"))
        async with httpx.AsyncClient(verify=known, timeout=PATIENCE_S) as friend:
            assert (await friend.get(url)).status_code == 200
        server.should_exit = True
        await task


async def test_mutual_tls_on_grpc_turns_strangers_away(authority):
    tls = tls_of(authority, mutual=True)
    async with running("mixed-0") as cluster:
        door = GrpcDoor(cluster.gateway, FakeOperator(), port=0, tls=tls)
        await door.start()
        try:
            certificate, key = authority.pair("client")
            ca = authority.path.read_bytes()
            friend = grpc.ssl_channel_credentials(ca, key.read_bytes(), certificate.read_bytes())
            target = f"localhost:{door.port}"
            async with grpc.aio.secure_channel(target, friend) as channel:
                reply = await rpc.ClusterStub(channel).Status(pb.StatusRequest())
                assert reply.model == "fake"
            stranger = grpc.ssl_channel_credentials(ca)
            async with grpc.aio.secure_channel(target, stranger) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await rpc.ClusterStub(channel).Status(pb.StatusRequest())
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            await door.stop(0.0)


def made(capsys, *arguments) -> tuple[int, dict]:
    status = tandem(["keys", "new", "--json", *arguments])
    out = capsys.readouterr().out
    return status, json.loads(out) if out else {}


@pytest.mark.parametrize("before", [None, "keys: []\n", "keys:\n- {name: x, tenant: t, hash: H}\n"])
def test_a_new_key_is_let_in_and_shown_only_once(tmp_path, capsys, before):
    file = tmp_path / "keys.yaml"
    if before is not None:
        file.write_text(before.replace("H", hash_key("tk-x")))
    status, document = made(capsys, "--tenant", "a", "--priority", "7", "--file", str(file))
    if before == "keys: []\n":
        assert (status, file.read_text()) == (2, before), "another style is left as it was"
        return
    assert status == 0
    caller = Keyring(file, 0.0).caller(document["key"], 0.0)
    assert (caller.tenant, caller.priority, caller.operator) == ("a", 7, False)
    assert document["key"] not in file.read_text()
    if before is None:
        assert file.stat().st_mode & 0o077 == 0
    else:
        assert Keyring(file, 0.0).caller("tk-x", 0.0).tenant == "t"


def test_a_second_key_joins_the_first_and_a_printed_line_works_by_hand(tmp_path, capsys):
    file = tmp_path / "keys.yaml"
    _, first = made(capsys, "--tenant", "a", "--file", str(file))
    _, second = made(capsys, "--tenant", "ops", "--operator", "--file", str(file))
    assert tandem(["keys", "new", "--tenant", "b"]) == 0
    shown, _, line = capsys.readouterr().out.partition("line for the file:\n")
    file.write_text(file.read_text() + line)
    ring = Keyring(file, 0.0)
    third = shown.split(": ")[1].strip()
    tenants = [ring.caller(key, 0.0).tenant for key in (first["key"], second["key"], third)]
    assert tenants == ["a", "ops", "b"]
    assert ring.caller(second["key"], 0.0).operator


def test_a_key_that_the_file_could_not_hold_is_not_made(tmp_path, capsys):
    file = tmp_path / "keys.yaml"
    status, document = made(capsys, "--tenant", "a", "--priority", "9999", "--file", str(file))
    assert (status, document) == (2, {})
    assert not file.exists()
