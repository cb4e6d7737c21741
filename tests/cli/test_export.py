"""``moka merge`` and ``moka export``: the commands, what they print, and what follows them."""

import json
import shutil

import pytest

from moka.export import formats


def question(place, media):
    return ["generate", place, "--image", media / "0.png", "--audio", media / "0.wav", "Which digit?"]


def row(out, name):
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return line.removeprefix(name).strip()


def test_merged_run_answers_and_is_measured_as_the_run(moka, trained_run, media, tmp_path):
    done = moka("merge", trained_run, "--output", tmp_path / "out", "--samples", media / "data.jsonl")
    assert done.code == 0, done.err[-500:]
    assert row(done.out, "format") == "text-merged"
    assert row(done.out, "modules changed / expected") == "4 / 4"
    assert float(row(done.out, "largest logit difference").split()[0]) < 1e-4
    assert row(done.out, "size on disk").endswith("kB")
    assert row(done.out, "next").startswith(f"moka generate {tmp_path / 'out'}")
    checks = json.loads((tmp_path / "out/export.json").read_text())["checks"]
    assert {f"sample s{i}" for i in range(8)} <= set(checks["differences"])

    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert moka(*question(tmp_path / "moved", media)).out == moka(*question(trained_run, media)).out
    copy = shutil.copytree(trained_run, tmp_path / "run")
    results = {}
    for folder in (copy, tmp_path / "moved"):
        done = moka("eval", folder, "--size", "4", "--no-blank")
        assert done.code == 0, done.err[-500:]
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        results[folder.name] = [json.loads(line)["prediction"] for line in lines]
    assert results["run"] == results["moved"]
    # It is no run that training could continue with, or replace.
    assert "output.dir" in moka("train", copy / "config.yaml", "--overwrite", f"output.dir={tmp_path / 'moved'}").last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--format", "hf-backbone"],
            ["encoders and projectors", "interaction", "random visual", "AutoModelForCausalLM"],
        ),
        (["--format", "lora"], ["visual, audio path", "interaction", "random audio", "PeftModel"]),
        (["--format", "lora", "--modality", "visual"], ["text, audio path", "random text", "PeftModel"]),
    ],
)
def test_lossy_formats_say_what_they_lose(moka, trained_run, tmp_path, arguments, words):
    done = moka("export", trained_run, "--output", tmp_path / "out", *arguments)
    assert done.code == 0, done.err[-500:]
    for word in ["lost", *words]:
        assert word in done.out, done.out
    assert row(done.out, "modules changed / expected") == "4 / 4"
    assert json.loads((tmp_path / "out/export.json").read_text())["lossy"]


def test_mistakes_are_one_line(refused, moka, trained_run, media, tmp_path):
    out = tmp_path / "out"
    assert "does not exist" in refused("merge", tmp_path / "none", "--output", out)
    assert "is inside it" in refused("merge", trained_run, "--output", trained_run / "adapter/merged")
    assert "none of the adapter's" in refused(
        "export", trained_run, "--format", "lora", "--modality", "smell", "--output", out
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text((media / "data.jsonl").read_text())
    assert "0.png" in refused("merge", trained_run, "--output", out, "--samples", broken)
    assert not out.exists()
    assert moka("export", trained_run, "--output", out, "--format", "gguf").code == 2
    assert moka("merge", trained_run).code == 2


def test_failed_verification_leaves_nothing(refused, trained_run, tmp_path, monkeypatch):
    write = formats.write
    monkeypatch.setattr(
        formats, "write", lambda source, folder: (write(source, folder), (folder / "config.json").write_text("{"))
    )
    line = refused("export", trained_run, "--format", "hf-backbone", "--output", tmp_path / "out")
    assert "failed its verification" in line
    assert list(tmp_path.iterdir()) == []


def test_export_is_replaced_when_asked(refused, moka, trained_run, tmp_path):
    arguments = ["export", trained_run, "--format", "lora", "--output", tmp_path / "out"]
    assert moka(*arguments).code == 0
    assert "--overwrite" in refused(*arguments)
    assert moka(*arguments, "--overwrite").code == 0
    assert "already" in refused("merge", tmp_path / "out", "--output", tmp_path / "again")
