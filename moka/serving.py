"""An HTTP server for trained models, with the chat completions of OpenAI's interface.

    POST /v1/chat/completions   text, pictures, sound, video; whole answers or server-sent events
    GET  /v1/models             the names of the models
    GET  /health

Media come inside a request, as data URLs: nothing in a request makes the server open a file or an address. One answer is
computed at a time; others wait.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from moka.answer import Answer
from moka.errors import MokaError
from moka.inference import LoadedModel
from moka.type_checks import check_types

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse
except ImportError as error:
    raise MokaError('moka serve needs FastAPI and uvicorn: pip install "moka-peft[serve]".') from error


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    megabytes: float = 32.0  # of a request, its media included
    new_tokens: int = 512  # of an answer
    seconds: float = 120.0  # from the start of an answer to its end
    waiting: int = 64  # requests at once, the one at work included


@dataclass
class ChatRequest:
    """The keys of a request that are known. Others are refused, as they would change the answer."""

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None  # absent or 0: greedy
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: int | None = None
    user: str | None = None  # of no effect
    metadata: dict[str, Any] | None = None  # of no effect
    store: bool | None = None  # of no effect

    @classmethod
    def read(cls, body: Any) -> ChatRequest:
        """Return a request whose keys, types and ranges are checked.

        Raises:
            MokaError: names the key.
        """
        if not isinstance(body, dict):
            raise MokaError("The body is no JSON object; send one with model and messages.")
        for name in ("model", "messages"):
            if name not in body:
                raise MokaError(f"{name} is missing.")
        for name in body:
            if name not in cls.__dataclass_fields__:
                raise MokaError(f"{name} is not supported; take it out.")
        check_types(cls, body, "", remedy="Correct it.")
        request = cls(**body)
        for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1), ("n", 1, 1)):
            value = getattr(request, name)
            if value is not None and not low <= value <= high:
                raise MokaError(f"{name} is {value}; allowed: {low} to {high}." if high > low else f"{name}: 1 only.")
        if request.top_p == 0:
            raise MokaError("top_p is 0; a number above 0 is expected.")
        return request

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer; none is part of it."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    def new_tokens(self, limits: Limits) -> int:
        """Return the longest answer in tokens.

        Raises:
            MokaError: more than the server allows.
        """
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if asked is None:
            return limits.new_tokens
        if not 1 <= asked <= limits.new_tokens:
            raise MokaError(f"max_tokens is {asked}; allowed: 1 to {limits.new_tokens}.")
        return asked

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of ``generate``."""
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}


def read_chat(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a request as those of ``moka.data.schema``, with media as bytes.

    Raises:
        MokaError: names the message and the part.
    """
    if not messages:
        raise MokaError("messages is empty; send at least one of role user.")
    chat = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        for key in message:
            if key not in ("role", "content", "name"):
                raise MokaError(f"{where}.{key} is not supported; take it out.")
        content = message.get("content")
        if isinstance(content, list):
            content = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        elif not isinstance(content, str):
            raise MokaError(f"{where}.content is {content!r}; allowed: a text, or a list of parts.")
        chat.append({"role": message.get("role"), "content": content})
    return chat


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    known = {"text": "text", "image_url": "image", "input_audio": "audio", "video_url": "video"}
    if kind not in known:
        raise MokaError(f"{where}.type is {kind!r}; allowed: {', '.join(known)}.")
    value = part.get(kind)
    if kind == "text":
        if not isinstance(value, str):
            raise MokaError(f"{where}.text is {value!r}; a text is expected.")
        return {"type": "text", "text": value}
    field_ = "data" if kind == "input_audio" else "url"
    given = value.get(field_) if isinstance(value, dict) else None
    if not isinstance(given, str):
        raise MokaError(f"{where}.{kind}.{field_} is missing; the medium is expected there, in base64.")
    if kind != "input_audio":
        head, comma, given = given.partition(",")
        if not (head.startswith("data:") and head.endswith(";base64") and comma):
            raise MokaError(
                f"{where}.{kind}.url is no data URL; send the medium itself, as data:image/png;base64,... "
                "Addresses and files are not opened."
            )
    try:
        medium = base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MokaError(f"{where}.{kind}.{field_} is no base64 ({error}).") from error
    return {"type": known[kind], known[kind]: medium}


def usage(answer: Answer) -> dict[str, int]:
    """Return the tokens of an answer, as OpenAI names them; a medium counts as its placeholders."""
    total = answer.prompt_tokens + answer.new_tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens, "total_tokens": total}


def build_app(models: dict[str, LoadedModel], limits: Limits | None = None, api_key: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        models: by the names that requests give.
        api_key: what ``Authorization: Bearer`` must give; None: anybody may ask.
    """
    limits = limits or Limits()
    app = FastAPI(title="moka", docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = asyncio.Semaphore(1)
    here: set[str] = set()
    began = int(time.time())

    @app.exception_handler(_Refused)
    async def refused(_: Request, error: _Refused) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(MokaError)
    async def wrong(_: Request, error: MokaError) -> JSONResponse:
        return JSONResponse(_Refused(400, str(error)).body, 400)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise _Refused(401, "The API key is missing or wrong; send it as Authorization: Bearer.", "invalid_api_key")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        check_key(request)
        data = [{"id": name, "object": "model", "created": began, "owned_by": "moka"} for name in models]
        return {"object": "list", "data": data}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        check_key(request)
        asked = ChatRequest.read(await _json_body(request, limits))
        if asked.model not in models:
            names = ", ".join(models)
            raise _Refused(404, f"model {asked.model!r} is not served; there is {names}.", "model_not_found")
        most = asked.new_tokens(limits)
        if len(here) >= limits.waiting:
            raise _Refused(429, f"{len(here)} requests are here already; try again later.", "rate_limit_exceeded")
        answer = Answer(
            models[asked.model],
            read_chat(asked.messages),
            most,
            limits.seconds,
            stops=asked.stops,
            seed=asked.seed,
            options=asked.sampling(),
            name="the request",
        )
        about: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }
        here.add(about["id"])
        texts = _read(answer, one_at_a_time)
        try:
            # The first part is computed before the response begins, so that mistakes have their status.
            first = await _unless_gone(request, answer, anext(texts, None))
        except BaseException:
            here.discard(about["id"])
            await texts.aclose()
            raise
        if asked.stream:
            events = _events(answer, asked, about, first, texts)
            return StreamingResponse(
                _finally(events, texts, lambda: here.discard(about["id"])), media_type="text/event-stream"
            )
        try:
            parts = [first or ""]
            while (part := await _unless_gone(request, answer, anext(texts, None))) is not None:
                parts.append(part)
        finally:
            here.discard(about["id"])
            await texts.aclose()
        message = {"role": "assistant", "content": "".join(parts)}
        choice = {"index": 0, "message": message, "finish_reason": answer.reason, "logprobs": None}
        return {**about, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    return app


class _Refused(Exception):
    """A response with a status of its own, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def _json_body(request: Request, limits: Limits) -> Any:
    # Only this type makes a browser ask before it sends a foreign page's request.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refused(415, "Content-Type is not application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.megabytes * 1e6:
            raise _Refused(413, f"The request is larger than {limits.megabytes:g} MB; send smaller or fewer media.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MokaError(f"The body is no JSON ({error}).") from error


async def _read(answer: Answer, one_at_a_time: asyncio.Semaphore) -> AsyncGenerator[str, None]:
    """Yield the texts of an answer without holding up other requests; its computation ends when this is closed."""
    async with one_at_a_time:
        answer.ending.deadline = time.monotonic() + answer.seconds
        texts, step = answer.texts(), None
        try:
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, texts, None))
                part = await asyncio.shield(step)
                if part is None:
                    break
                yield part
        finally:
            answer.ending.asked.set()
            if step is not None:  # a generator that runs cannot be closed
                await asyncio.wait([step])
            await asyncio.to_thread(texts.close)


async def _unless_gone(request: Request, answer: Answer, step: Any) -> str | None:
    """Await the next text of an answer; end its computation if the client hangs up before."""
    task = asyncio.ensure_future(step)
    while not (await asyncio.wait([task], timeout=0.25))[0]:
        if await request.is_disconnected():
            answer.ending.asked.set()
            task.cancel()
            await asyncio.wait([task])
            raise _Refused(499, "The client hung up.")
    return task.result()


async def _events(
    answer: Answer, asked: ChatRequest, about: dict[str, Any], first: str | None, texts: AsyncIterator[str]
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer."""

    def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _line({**about, "object": "chat.completion.chunk", "choices": [choice], **more})

    yield event({"role": "assistant", "content": first or ""})
    try:
        async for part in texts:
            yield event({"content": part})
    except MokaError as error:
        yield _line(_Refused(400, str(error)).body)
        return
    yield event({}, answer.reason)
    if (asked.stream_options or {}).get("include_usage"):
        yield _line({**about, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)})
    yield "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _finally(
    events: AsyncIterator[str], texts: AsyncGenerator[str, None], done: Callable[[], None]
) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield event
    finally:
        await texts.aclose()
        done()
