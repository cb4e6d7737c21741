"""`moka demo`: a real process, asked over HTTP and in a browser, gives the answers of ``moka.load``; mistakes are one line."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import gradio_client
import httpx
import numpy as np
import pytest
import torch
from gradio_client.exceptions import AppError
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import moka
from moka.cli.demo import _free_port, _is_loopback
from moka.demo_page import COLUMNS, Asking, build_page, coalitions, media_kinds, write_examples
from moka.errors import MokaError
from moka.evaluation.answers import before_answer
from moka.evaluation.evaluate import open_questions

ROOT = Path(__file__).parents[1]
QUESTION = "Which digit is written?"
ALL = ["image", "audio", "video"]
TOKENS = 12


@contextlib.contextmanager
def opened(run, *options):
    """The address of `moka demo run`, and its process."""
    command = [sys.executable, "-m", "moka", "demo", str(run), "--port", "0", "--device", "cpu", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        raise AssertionError(said)
    try:
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@pytest.fixture(scope="module")
def run(tiny_config, backbones, tmp_path_factory):
    """The folder of a short run, on a random backbone that answers with words."""
    from moka.training import config_from_dict, run_training

    folder = tmp_path_factory.mktemp("talks")
    shutil.copytree(backbones["llama"], folder / "backbone")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(folder / "backbone")
    config.initializer_range, config.tie_word_embeddings = 0.5, False
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    raw = tiny_config(folder / "both", model__backbone=str(folder / "backbone"), alignment__max_steps=2)
    return run_training(config_from_dict(raw | {"output": {"dir": str(folder / "both"), "samples": 0}}))


@pytest.fixture(scope="module")
def address(run):
    with opened(run, "--max-new-tokens", str(TOKENS), "--max-megabytes", "1") as address:
        yield address


@pytest.fixture(scope="module")
def loaded(run):
    return moka.load(run, device="cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "digit.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.random.default_rng(1).integers(-9000, 9000, 4000, np.int16).tobytes())
    return str(path)


@pytest.fixture
def client(address):
    """A session of its own."""
    return gradio_client.Client(address, verbose=False, analytics_enabled=False)


def arguments(question, use=ALL, image=None, audio=None):
    files = [path and gradio_client.handle_file(path) for path in (image, audio)]
    return [question, list(use), *files, None]


def answer(client, *args, **kwargs):
    shown, counts, left = client.predict(*arguments(*args, **kwargs), api_name="/ask")
    return _text(shown[-1]), shown, counts, left


def _text(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@pytest.mark.parametrize(
    "given", [(), ("image",), ("audio",), ("image", "audio")], ids=["text", "picture", "sound", "both"]
)
def test_answers_are_those_of_the_library(client, loaded, picture, sound, given):
    media = {name: path for name, path in {"image": picture, "audio": sound}.items() if name in given}
    text, shown, counts, left = answer(client, QUESTION, **media)
    assert len(text) > 5
    assert text == loaded.generate(QUESTION, max_new_tokens=TOKENS, **media)
    assert QUESTION in _text(shown[0])
    assert left == ""
    chat = [
        {
            "role": "user",
            "content": [*({"type": k, k: v} for k, v in media.items()), {"type": "text", "text": QUESTION}],
        }
    ]
    assert f"prompt {loaded.encode([chat], TOKENS)['input_ids'].shape[1]} tokens" in counts


def test_a_modality_that_is_off_is_left_out(client, loaded, picture, sound):
    text, *_ = answer(client, QUESTION, ["audio"], picture, sound)
    assert text == loaded.generate(QUESTION, audio=sound, max_new_tokens=TOKENS)


def test_turns_follow_each_other_and_keep_their_media(client, loaded, picture):
    first, *_ = answer(client, QUESTION, image=picture)
    second, shown, *_ = answer(client, "Is it odd?", image=picture)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": first or " "},
        {"role": "user", "content": "Is it odd?"},
    ]
    assert second == loaded.generate(messages=chat, max_new_tokens=TOKENS)
    assert len(shown) == 4


def test_the_stream_grows_into_the_answer(client, loaded, picture):
    job = client.submit(*arguments(QUESTION, image=picture), api_name="/ask")
    whole = _text(job.result()[0][-1])
    texts = [_text(each[0][-1]) for each in job.outputs()]
    assert all(whole.startswith(text) for text in texts)
    assert texts == sorted(texts, key=len)
    assert whole == loaded.generate(QUESTION, image=picture, max_new_tokens=TOKENS)


def test_answers_with_and_without_each_modality_are_compared(client, loaded, picture, sound):
    table = client.predict(*arguments(QUESTION, image=picture, audio=sound), api_name="/compare")
    assert table["headers"] == COLUMNS
    expected = {
        "everything": {"image": picture, "audio": sound},
        "without picture": {"audio": sound},
        "without sound": {"image": picture},
        "text only": {},
    }
    assert {row[0]: row[1] for row in table["data"]} == {
        name: loaded.generate(QUESTION, max_new_tokens=TOKENS, **media) for name, media in expected.items()
    }


def test_comparing_after_an_answer_asks_the_same_question(client, loaded, picture):
    text, *_ = answer(client, QUESTION, image=picture)
    table = client.predict(*arguments("", image=picture), api_name="/compare")
    assert [row[:2] for row in table["data"]] == [
        ["everything", text],
        ["text only", loaded.generate(QUESTION, max_new_tokens=TOKENS)],
    ]


def test_rows_of_a_comparison():
    assert coalitions([]) == [("text only", [])]
    assert coalitions(["image"]) == [("everything", ["image"]), ("text only", [])]
    assert [kept for _, kept in coalitions(["image", "audio", "video"])] == [
        ["image", "audio", "video"],
        ["audio", "video"],
        ["image", "video"],
        ["image", "audio"],
        [],
    ]


def test_a_question_of_a_broken_file_leaves_the_chat_usable(client, loaded, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    with pytest.raises(AppError, match=r"bad\.png") as error:
        answer(client, QUESTION, image=str(bad))
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert "/bad.png" not in str(error.value)
    text, shown, *_ = answer(client, QUESTION)
    assert text == loaded.generate(QUESTION, max_new_tokens=TOKENS)
    assert len(shown) == 2


@pytest.mark.parametrize(
    ("action", "question", "words"),
    [
        ("/ask", "  ", "question is empty"),
        ("/compare", "", "question is empty"),
        ("/maps", "", "question is empty"),
        ("/ask", "one " * 9000, "tokens"),
        ("/compare", "one " * 9000, "tokens"),
        ("/maps", QUESTION, "0 pictures"),
    ],
)
def test_mistakes_are_told(client, action, question, words):
    with pytest.raises(AppError, match=words):
        client.predict(*arguments(question), api_name=action)


def test_a_sound_that_is_none_is_told(client, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"#EXTM3U\nfile:///etc/passwd")
    with pytest.raises(AppError, match=r"bad\.wav"):
        answer(client, QUESTION, audio=str(tmp_path / "bad.wav"))


@pytest.mark.parametrize("path", ["/etc/hostname", str(ROOT / "README.md")])
def test_files_of_the_machine_are_not_read(address, path):
    """As a client would ask that does not upload the file itself."""
    given = [QUESTION, ALL, {"path": path, "meta": {"_type": "gradio.FileData"}}, None, None]
    event = httpx.post(f"{address}/gradio_api/call/ask", json={"data": given}).json()["event_id"]
    said = httpx.get(f"{address}/gradio_api/call/ask/{event}", timeout=60).text
    assert "event: error" in said
    assert "is not an image" not in said  # it was not even opened


def test_the_page_and_its_examples(client, address):
    page = httpx.get(address).text
    assert "fonts.googleapis" not in page
    config = client.config
    labels = [c["props"].get("label") for c in config["components"]]
    assert {"Picture", "Sound", "Video", "Answer with"} <= set(labels)
    (examples,) = [c["props"] for c in config["components"] if c["type"] == "dataset"]
    assert len(examples["samples"]) == 8
    assert not config["analytics_enabled"]


def test_examples_are_the_first_questions_of_the_test_data(loaded, tmp_path):
    samples = open_questions("embedded:audio-visual-text", "test")
    rows = write_examples(loaded, samples, tmp_path, 3)
    assert len(rows) == 3
    for number, (image, audio, video, question) in enumerate(rows):
        messages = before_answer(samples[number]["messages"])
        media = {name: path for name, path in {"image": image, "audio": audio}.items() if path}
        assert loaded.generate(question, max_new_tokens=TOKENS, **media) == loaded.generate(
            messages=messages, max_new_tokens=TOKENS
        )
        assert video is None


def test_only_the_modalities_of_the_run_are_on_the_page(tiny_config, tmp_path):
    from moka.training import config_from_dict, run_training

    raw = tiny_config(tmp_path / "run", training__max_steps=1, alignment__max_steps=1)
    del raw["model"]["modalities"]["visual"]
    raw["data"] |= dict.fromkeys(("alignment", "train", "validation", "test"), "embedded:speech-text")
    loaded = moka.load(run_training(config_from_dict(raw)), device="cpu")
    assert media_kinds(loaded) == ["audio"]
    labels = [block.label for block in build_page(loaded).blocks.values() if hasattr(block, "label")]
    assert "Sound" in labels
    assert not {"Picture", "Video"} & set(labels)


def test_maps_show_words_over_the_picture(loaded, picture, monkeypatch):
    asking = Asking(loaded, ALL, TOKENS, 60.0)
    import gradio as gr

    # Two mixed tokens have no place in the picture.
    with pytest.raises(gr.Error, match="no place"):
        asking.maps(QUESTION, ALL, [], picture, None, None)
    monkeypatch.setattr("moka.diagnosis.examples.picture_grid", lambda model, batch, tokens: (1, tokens))
    shown = asking.maps(QUESTION, ALL, [], picture, None, None)
    assert shown.count("data:image/jpeg") == 3


def test_an_answer_that_takes_too_long_is_told(loaded):
    import gradio as gr

    with pytest.raises(gr.Error, match="longer than"):
        list(Asking(loaded, ALL, TOKENS, 1e-6).ask(QUESTION, ALL, [], None, None, None))


def test_without_gradio_the_package_is_named(trained_run):
    program = "import sys\nsys.modules['gradio'] = None\nfrom moka.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "demo", str(trained_run), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "moka-peft[page]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_address_is_checked():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MokaError, match=str(port)):
            _free_port("127.0.0.1", port)
    assert _free_port("127.0.0.1", 0) > 0
    assert _is_loopback("127.0.0.1")
    assert _is_loopback("localhost")
    assert not _is_loopback("0.0.0.0")


@pytest.mark.slow
def test_a_browser_asks(address, loaded, picture, sound):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium can be started: {error}")
        page = browser.new_page()
        elsewhere = []
        page.on(
            "request", lambda r: elsewhere.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
        )
        page.goto(address)
        page.locator("#image input[type=file]").set_input_files(picture)
        page.locator("#audio input[type=file]").set_input_files(sound)
        page.locator("#image img").wait_for()
        page.locator("#question textarea").fill(QUESTION)
        page.locator("#ask").click()
        sync_api.expect(page.locator("#counts")).to_contain_text("answer", timeout=60_000)
        expected = loaded.generate(QUESTION, image=picture, audio=sound, max_new_tokens=TOKENS)
        assert " ".join(expected.split()) in " ".join(page.locator("#chat").inner_text().split())
        page.get_by_text("Which digit is spoken?").first.click()  # an example, whose sound is features
        sync_api.expect(page.locator("#question textarea")).to_have_value("Which digit is spoken?")
        sync_api.expect(page.locator("#counts")).not_to_contain_text("answer")  # a new chat
        page.locator("#ask").click()
        sync_api.expect(page.locator("#counts")).to_contain_text("answer", timeout=60_000)
        assert QUESTION not in page.locator("#chat").inner_text()
        page.locator("#compare").click()
        sync_api.expect(page.locator("#compared")).to_contain_text("without sound", timeout=60_000)
        page.locator("#ask").click()  # the question is empty now
        sync_api.expect(page.get_by_text("The question is empty")).to_be_visible(timeout=60_000)
        page.screenshot(path=os.environ.get("MOKA_SCREENSHOT") or None, full_page=True)
        assert not elsewhere
        browser.close()
