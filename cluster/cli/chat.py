"""`tandem generate` and `tandem chat`: answers streamed over gRPC."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.options import ApiKey, Json, Server, open_client
from engine.errors import BadRequest

if TYPE_CHECKING:
    from cluster.access import Generation
    from cluster.client import Client
    from cluster.rpc import tandem_pb2 as pb

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1, max=2**31 - 1)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)]


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(chat)


def generate(
    prompt: Annotated[str, typer.Argument(help="- reads it from standard input.")],
    *,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(min=-(2**63), max=2**63 - 1)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Streams a completion."""
    from cluster.rpc import tandem_pb2 as pb

    text = _text(prompt)
    sampling = pb.Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    request = pb.GenerateRequest(text=text, sampling=sampling, stop=stop or [])
    with open_client(server, api_key) as client:
        generation = _stream(client, request, quiet=as_json)
    if as_json:
        print(json.dumps(as_document(generation), indent=2))


def _text(prompt: str) -> str:
    try:
        return sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise BadRequest("prompt", prompt, "must be text in UTF-8") from error


def chat(
    *,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Talks with the model, a line at a time, until end of input."""
    from cluster.rpc import tandem_pb2 as pb

    turns = [] if system is None else [pb.ChatMessage(role="system", content=system)]
    sampling = pb.Sampling(max_tokens=max_tokens, temperature=temperature)
    answers = []
    with open_client(server, api_key) as client:
        for line in _lines(quiet=as_json):
            turns.append(pb.ChatMessage(role="user", content=line))
            request = pb.GenerateRequest(chat=pb.Chat(messages=turns), sampling=sampling)
            generation = _stream(client, request, quiet=as_json)
            turns.append(pb.ChatMessage(role="assistant", content=generation.text))
            answers.append(as_document(generation))
    if as_json:
        print(json.dumps(answers, indent=2))


def _lines(*, quiet: bool) -> Any:
    """What the person says; a prompt only where a person is."""
    prompt = sys.stdin.isatty() and not quiet
    while True:
        if prompt:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _stream(client: Client, request: pb.GenerateRequest, *, quiet: bool) -> Generation:
    from cluster.access import Generation

    generation = Generation()
    for chunk in client.stream(request):
        generation.add(chunk)
        if not quiet:
            print(chunk.text, end="", flush=True)
    if not quiet:
        print()
    return generation


def as_document(generation: Generation) -> dict[str, Any]:
    """The fields that `generate --json` promises."""
    summary = generation.summary
    document: dict[str, Any] = {
        "id": generation.request_id,
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
    }
    if summary is None:
        return document
    usage, route = summary.usage, summary.route
    return document | {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "ttft_s": summary.ttft_s if summary.HasField("ttft_s") else None,
        "tpot_s": summary.tpot_s if summary.HasField("tpot_s") else None,
        "route": {"prefill": route.prefill, "decode": route.decode},
        "migrations": summary.migrations,
    }
