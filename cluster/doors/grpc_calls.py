"""Between protobuf and the gateway's own records."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.gateway.call import Call, Targets
from cluster.rpc import tandem_pb2 as pb
from engine.errors import BadRequest
from engine.request import Grammar, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.gateway.answer import Answer, Delta

ROLES = ("system", "developer", "user", "assistant", "tool")
PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "logprobs",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def call_of(request: pb.GenerateRequest) -> Call:
    """Raises BadRequest for what the gateway's own rules cannot see."""
    sampling, given = request.sampling, request.HasField
    call = Call(
        sampling=sampling_of(sampling),
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        seed=sampling.seed if sampling.HasField("seed") else None,
        n=request.n if given("n") else 1,
        stop=tuple(request.stop),
        echo=request.echo,
        priority=request.priority if given("priority") else 0,
        targets=Targets(
            request.slo_ttft_s if given("slo_ttft_s") else None,
            request.slo_tpot_s if given("slo_tpot_s") else None,
        ),
        request_id=request.request_id or None,
    )
    match request.WhichOneof("prompt"):
        case "text":
            return replace(call, prompts=(request.text,))
        case "tokens":
            return replace(call, prompts=(tuple(request.tokens.ids),))
        case "chat":
            return replace(call, chat=tuple(_message(one) for one in request.chat.messages))
        case _:
            raise BadRequest("prompt", None, "give text, tokens or chat")


def sampling_of(given: pb.Sampling) -> Sampling:
    plain: dict[str, Any] = {
        name: getattr(given, name) for name in PLAIN_FIELDS if given.HasField(name)
    }
    if plain.get("top_k") == 0:
        del plain["top_k"]
    grammar = Grammar(given.grammar.kind, given.grammar.text) if given.HasField("grammar") else None
    return Sampling(
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        logit_bias=tuple(sorted(given.logit_bias.items())),
        grammar=grammar,
        **plain,
    )


def _message(given: pb.ChatMessage) -> dict[str, str]:
    if given.role not in ROLES:
        raise BadRequest("chat.role", given.role, f"must be one of {', '.join(ROLES)}")
    return {"role": given.role, "content": given.content}


def chunk_of(answer: Answer, delta: Delta) -> pb.GenerateChunk:
    chunk = pb.GenerateChunk(request_id=answer.id, choice=delta.choice, text=delta.text)
    if delta.token is not None:
        chunk.token_ids.append(delta.token)
    if delta.logprobs is not None:
        top = [pb.TopLogprob(token=t, logprob=value) for t, value in delta.logprobs.top]
        chunk.logprobs.append(pb.TokenLogprobs(logprob=delta.logprobs.chosen, top=top))
    if delta.finish is not None:
        chunk.finish_reason = delta.finish.value
    return chunk


def chunks_of(answer: Answer, deltas: Sequence[Delta]) -> list[pb.GenerateChunk]:
    """The last chunk of the whole answer carries its summary."""
    chunks = [chunk_of(answer, delta) for delta in deltas]
    if answer.done:
        chunks[-1].summary.CopyFrom(summary_of(answer))
    return chunks


def summary_of(answer: Answer) -> pb.Summary:
    """Latencies and route are those of the first answer."""
    first = answer.choices[0]
    prompt, output = answer.prompt_tokens, answer.output_tokens
    usage = pb.Usage(prompt_tokens=prompt, completion_tokens=output, total_tokens=prompt + output)
    parts = {f"{name}_s": value for name, value in first.timeline.parts_s().items()}
    return pb.Summary(
        usage=usage,
        ttft_s=first.timeline.ttft_s,
        tpot_s=first.timeline.tpot_s(first.output_tokens),
        route=pb.Route(prefill=first.prefill, decode=first.decode),
        migrations=0 if first.entry is None else first.entry.migrations,
        parts=pb.TtftParts(**parts),
    )
