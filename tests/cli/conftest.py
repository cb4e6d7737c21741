"""The command line in this process, and a small data set of real picture and sound files."""

import json
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from moka.cli.main import main


@pytest.fixture
def moka(capsys):
    """Runs ``moka ARGUMENTS...``; gives its exit code, what it printed, and its last line of errors."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip()]
        return SimpleNamespace(code=code, out=out, err=err, last=lines[-1] if lines else "")

    return run


@pytest.fixture
def refused(moka):
    """Runs a command that must be refused: code 2, one clear line, no traceback. Gives that line."""

    def run(*arguments):
        done = moka(*arguments)
        assert done.code == 2, (done.code, done.err[-500:])
        assert done.last.startswith("moka: error: "), done.err[-500:]
        assert sum(line.startswith("moka: error") for line in done.err.splitlines()) == 1
        assert "Traceback" not in done.err
        return done.last

    return run


@pytest.fixture
def config_file(tiny_config, tmp_path):
    """The YAML file of a tiny run into ``tmp_path / "run"``, and that folder."""

    def write(**changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", **changes), sort_keys=False))
        return path, tmp_path / "run"

    return write


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A folder of pictures and sounds as a user has them, and ``data.jsonl`` that asks about them."""
    folder = tmp_path_factory.mktemp("media")
    samples = []
    for i in range(8):
        # Dark ink on white paper, 300 x 200; 44.1 kHz stereo.
        picture = Image.new("RGB", (300, 200), "white")
        ImageDraw.Draw(picture).line([(100 + 10 * i, 40), (150, 160)], fill="black", width=12)
        picture.save(folder / f"{i}.png")
        time = np.arange(22050) / 44100
        tone = np.sin(2 * np.pi * (200 + 100 * i) * time)
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(44100)
            file.writeframes((np.stack([tone, 0.5 * tone], axis=1) * 20000).astype("<i2").tobytes())
        content = [
            {"type": "image", "image": f"{i}.png"},
            {"type": "audio", "audio": f"{i}.wav"},
            {"type": "text", "text": "Which digit is written?"},
        ]
        samples.append(
            {
                "id": f"s{i}",
                "category": "even" if i % 2 == 0 else "odd",
                "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "one"}],
            }
        )
    write_jsonl(folder / "data.jsonl", samples)
    return folder


def write_jsonl(path, samples):
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path
