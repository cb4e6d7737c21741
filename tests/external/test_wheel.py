"""From the wheel alone, in an empty folder: train, serve, ask with the openai client."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of processes that see the wheel's moka before any other."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
def test_train_serve_and_ask(environment, tmp_path):
    def moka(*words):
        command = [sys.executable, "-m", "moka", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = [sys.executable, "-c", "import moka; print(moka.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(environment["PYTHONPATH"])
    assert "quickstart/audio_visual_text" in moka("recipes")
    moka("recipes", "copy", "quickstart")
    moka("train", "quickstart.yaml", "--tiny")
    command = [sys.executable, "-m", "moka", "serve", "runs/quickstart-tiny", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/v1", line)[0]
            client = openai.OpenAI(base_url=address, api_key="none")
            for _ in range(100):
                try:
                    names = [model.id for model in client.models.list()]
                    break
                except openai.APIConnectionError:
                    time.sleep(0.1)
            assert names == ["quickstart-tiny"]
            chat = [{"role": "user", "content": "Which digit is written?"}]
            answer = client.chat.completions.create(model=names[0], messages=chat, max_tokens=4)
            assert answer.usage.completion_tokens in range(1, 5)
        finally:
            server.terminate()
