"""`moka serve`: a real server and the real openai client give the answers of ``moka.load``; wrong requests are told."""

import base64
import contextlib
import io
import json
import re
import socket
import threading
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

import moka
from moka.answer import Answer, _Ending, _until_stop
from moka.cli.serve import _key, _named
from moka.errors import MokaError
from moka.serving import ChatRequest, Limits, build_app

KEY = "secret"


def picture():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def sound():
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.random.default_rng(1).integers(-9000, 9000, 4000, np.int16).tobytes())
    return buffer.getvalue()


def as_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


TEXT = {"type": "text", "text": "Which digit is written?"}
PICTURE = {"type": "image_url", "image_url": {"url": as_url(picture())}}
SOUND = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "wav"}}


def ask(*parts):
    return [{"role": "user", "content": [*parts, TEXT]}]


@pytest.fixture(scope="module")
def loaded(trained_run):
    return moka.load(trained_run, device="cpu")


@contextlib.contextmanager
def served(app):
    """The address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def address(loaded):
    """The address of a server of one model under two names."""
    limits = Limits(megabytes=0.5, new_tokens=60, waiting=9)
    with served(build_app({"one": loaded, "two": loaded}, limits, KEY)) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def post(address, body, **headers):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    content = body if isinstance(body, bytes) else json.dumps(body)
    return httpx.post(f"{address}/v1/chat/completions", content=content, headers=headers, timeout=60)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["one", "two"]


@pytest.mark.parametrize("parts", [[], [PICTURE], [SOUND], [PICTURE, SOUND]], ids=["text", "picture", "sound", "both"])
def test_answers_are_those_of_the_library(client, loaded, parts):
    media = {"image": picture() if PICTURE in parts else None, "audio": sound() if SOUND in parts else None}
    expected = loaded.generate(TEXT["text"], max_new_tokens=12, **media)
    answer = client.chat.completions.create(model="one", messages=ask(*parts), max_tokens=12)
    assert answer.choices[0].message.content == expected
    assert answer.model == "one"
    batch = loaded.encode([[{"role": "user", "content": [*_parts(media), TEXT]}]], 12)
    assert answer.usage.prompt_tokens == batch["input_ids"].shape[1]
    assert answer.usage.completion_tokens <= 12
    assert answer.choices[0].finish_reason == ("length" if answer.usage.completion_tokens == 12 else "stop")


def _parts(media):
    return [{"type": kind, kind: one} for kind, one in media.items() if one is not None]


def test_a_stream_is_the_same_answer(client):
    whole = client.chat.completions.create(model="one", messages=ask(PICTURE), max_tokens=30)
    events = list(
        client.chat.completions.create(
            model="one", messages=ask(PICTURE), max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


def test_a_chat_of_several_turns(client, loaded):
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Which digit?"},
    ]
    answer = client.chat.completions.create(model="two", messages=chat, max_tokens=8)
    assert answer.choices[0].message.content == loaded.generate(messages=chat, max_new_tokens=8)


def test_eight_clients_at_once_get_their_own_answers(client):
    questions = [f"Which digit is number {i}?" for i in range(8)]

    def answer(question):
        chat = [{"role": "user", "content": question}]
        return client.chat.completions.create(model="one", messages=chat, max_tokens=10).choices[0].message.content

    alone = [answer(question) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, questions)) == alone


def test_sampling_is_repeatable_by_its_seed(client):
    def draw(seed):
        answer = client.chat.completions.create(
            model="one", messages=ask(), max_tokens=20, temperature=2.0, top_p=0.99, seed=seed
        )
        return answer.choices[0].message.content

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_a_stop_text_ends_the_answer(client):
    options = {"model": "one", "messages": ask(), "max_tokens": 40, "temperature": 2.0, "seed": 3}
    whole = client.chat.completions.create(**options).choices[0].message.content
    assert len(whole) > 9
    stop = whole[5:7]
    answer = client.chat.completions.create(**options, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.find(stop)].rstrip()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40


@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_part_of_a_stop_text_leaks(size):
    text = "  one two STOP three"
    parts = (text[i : i + size] for i in range(0, len(text), size))
    ending = _Ending(1.0)
    assert "".join(_until_stop(parts, ["STOP", "three"], ending)) == "one two"
    assert ending.asked.is_set()
    parts = (text[i : i + size] for i in range(0, len(text), size))
    assert "".join(_until_stop(parts, [], ending)) == text.strip()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_ends_its_answer(loaded, stream, monkeypatch):
    """The server is asked by hand, so that what it does after the client has gone can be seen."""
    answers, ended = [], threading.Event()
    own = Answer.texts

    def texts(self):
        answers.append(self)
        yield "first"
        while not self.ending.asked.is_set():
            time.sleep(0.01)
        ended.set()
        yield from own(self)

    monkeypatch.setattr(Answer, "texts", texts)
    with served(build_app({"one": loaded}, Limits(new_tokens=60, waiting=1))) as address:
        body = {"model": "one", "messages": ask(), "stream": stream}
        with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
            client.post(f"{address}/v1/chat/completions", json=body, timeout=0.5)
        assert ended.wait(10)
        monkeypatch.setattr(Answer, "texts", own)
        for _ in range(100):  # the place of the one that left is free again
            again = httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": False}, timeout=60)
            if again.status_code != 429:
                break
            time.sleep(0.1)
        assert again.status_code == 200
    assert len(answers) == 1


REFUSED = {
    "another model": ({"model": "three"}, 404, "three"),
    "no messages": ({"messages": []}, 400, "messages is empty"),
    "a key that is not known": ({"tools": []}, 400, "tools is not supported"),
    "a type": ({"temperature": "hot"}, 400, "temperature"),
    "a range": ({"temperature": 3.0}, 400, "temperature is 3.0"),
    "two answers": ({"n": 2}, 400, "n: 1 only"),
    "too many tokens": ({"max_tokens": 61}, 400, "1 to 60"),
    "a file": ({"messages": ask({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})}, 400, "data URL"),
    "an address": (
        {"messages": ask({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}})},
        400,
        "data URL",
    ),
    "a path as a medium": ({"messages": ask({"type": "image", "image": "/etc/passwd"})}, 400, "type is 'image'"),
    "no base64": (
        {"messages": ask({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}})},
        400,
        "no base64",
    ),
    "no picture": (
        {"messages": ask({"type": "image_url", "image_url": {"url": as_url(b"#EXTM3U\nfile:///etc/passwd")}})},
        400,
        "image",
    ),
    "a playlist": (
        {
            "messages": ask(
                {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"#EXTM3U\nfile:///x").decode()}}
            )
        },
        400,
        "audio",
    ),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
    "too long": ({"messages": [{"role": "user", "content": "one " * 9000}]}, 400, "tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_wrong_requests_are_told(address, name, stream):
    changes, status, words = REFUSED[name]
    response = post(address, {"model": "one", "messages": ask(), "max_tokens": 4, "stream": stream, **changes})
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"model": "one"}', {}, 400),
        (b"x" * 600_000, {}, 413),
        ({"model": "one", "messages": ask()}, {"Authorization": "Bearer other"}, 401),
        ({"model": "one", "messages": ask()}, {"Content-Type": "text/plain"}, 415),
    ],
)
def test_bodies_and_headers_are_checked(address, body, headers, status):
    response = post(address, body, **headers)
    assert response.status_code == status
    assert KEY not in response.text


def test_an_answer_that_takes_too_long_is_an_error(loaded):
    from fastapi.testclient import TestClient

    app = build_app({"one": loaded}, Limits(seconds=1e-6, new_tokens=60))
    response = TestClient(app).post("/v1/chat/completions", json={"model": "one", "messages": ask()})
    assert response.status_code == 400
    assert "longer than 1e-06 s" in response.json()["error"]["message"]


def test_more_requests_than_may_wait_are_refused(loaded):
    from fastapi.testclient import TestClient

    app = build_app({"one": loaded}, Limits(waiting=0))
    response = TestClient(app).post("/v1/chat/completions", json={"model": "one", "messages": ask()})
    assert response.status_code == 429


def test_names_and_keys_of_the_command_line(tmp_path, monkeypatch):
    assert _named("digits=runs/quickstart") == ("digits", "runs/quickstart")
    assert _named("runs/quickstart/") == ("quickstart", "runs/quickstart/")
    monkeypatch.setenv("MOKA_API_KEY", "from the environment")
    assert _key(None) == "from the environment"
    (tmp_path / "key").write_text("from a file\n")
    assert _key(tmp_path / "key") == "from a file"
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(MokaError, match="is empty"):
        _key(tmp_path / "empty")


def test_every_key_of_a_request_is_checked_by_type():
    good = {"model": "one", "messages": ask()}
    assert ChatRequest.read(good).new_tokens(Limits(new_tokens=7)) == 7
    for name in ChatRequest.__dataclass_fields__:
        with pytest.raises(MokaError, match=name):
            ChatRequest.read({**good, name: object()})


def test_the_page_asks_as_it_says(address, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    code = code.replace("http://127.0.0.1:8000", address).replace('"none"', f'"{KEY}"').replace("quickstart", "one")
    monkeypatch.chdir(tmp_path)
    Path("digit.png").write_bytes(picture())
    Path("digit.wav").write_bytes(sound())
    exec(compile(code, "docs/serving.md", "exec"), {"__name__": "page"})
    whole, stream = capsys.readouterr().out.split("\n", 1)
    assert whole == stream
