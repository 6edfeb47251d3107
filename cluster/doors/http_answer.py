"""An answer over HTTP: whole, or as server-sent events with one token a chunk."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from cluster.doors.http_errors import error_json, error_response
from cluster.doors.keys import Metered
from cluster.doors.openai_replies import DONE
from cluster.gateway.answer import ClientGone
from engine.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

    from cluster.doors.keys import Caller
    from cluster.doors.openai_replies import Format
    from cluster.gateway.answer import Answer, Delta
    from cluster.gateway.call import Call
    from cluster.gateway.gateway import Gateway

LOG = logging.getLogger(__name__)


class AnswerResponse(Response):
    """Admits a call when it is sent, so that a client that leaves early frees everything."""

    def __init__(
        self,
        gateway: Gateway,
        call: Call,
        caller: Caller,
        make: Callable[[Answer], Format],
        *,
        stream: bool,
        with_usage: bool,
    ) -> None:
        self._gateway, self._call, self._caller, self._make = gateway, call, caller, make
        self._stream, self._with_usage = stream, with_usage
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._gateway.open(self._call)
        except TandemError as error:
            await error_response(error)(scope, receive, send)
            return
        headers = {"x-request-id": answer.id}
        metered = Metered(answer, self._caller)
        watch = asyncio.create_task(_leave(answer, receive))
        try:
            deltas = await metered.next()
            if self._stream:
                await self._write_stream(metered, deltas, headers, send)
            else:
                body = await self._whole(metered, deltas)
                await Response(body, 200, headers, "application/json")(scope, receive, send)
        except ClientGone:
            LOG.info("client left request=%s", answer.id)
        except TandemError as error:
            await error_response(error, headers)(scope, receive, send)
        finally:
            watch.cancel()
            self._gateway.close(answer)
            metered.charge()

    async def _whole(self, metered: Metered, deltas: list[Delta]) -> bytes:
        every = deltas
        while deltas := await metered.next():
            every += deltas
        return self._make(metered.answer).whole(every)

    async def _write_stream(
        self, metered: Metered, deltas: list[Delta], headers: dict[str, str], send: Send
    ) -> None:
        shape = self._make(metered.answer)
        await send(_stream_start(headers))
        try:
            while deltas:
                await send(_stream_part(shape.chunks(deltas)))
                deltas = await metered.next()
            last = shape.usage_chunk() + DONE if self._with_usage else DONE
        except ClientGone:
            raise
        except TandemError as error:
            last = b"data: " + error_json(error)[1] + b"\n\n"
        await send(_stream_part(last, more=False))


async def _leave(answer: Answer, receive: Receive) -> None:
    """Ends the answer when its client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        continue
    answer.fail(ClientGone("the client left"))


def _stream_start(headers: dict[str, str]) -> dict[str, Any]:
    named = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        **headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    return {"type": "http.response.start", "status": 200, "headers": raw}


def _stream_part(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}
