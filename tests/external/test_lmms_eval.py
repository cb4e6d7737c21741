"""lmms-eval asks a run by the entry point of its plug-in. `make test-integrations` runs it with the newest lmms-eval."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is in an environment of its own: make test-integrations")

import moka
from moka.data.schema import media_parts
from moka.data.sources import open_samples
from moka.evaluation.answers import before_answer
from moka.evaluation.benchmarks import score

TASKS = Path(moka.__file__).parent / "integrations" / "lmms_eval_tasks"
FIXTURES = Path(__file__).parents[1] / "data" / "formats" / "fixtures"


def lmms_eval(run, task, include, folder, fails=False, **environment):
    """The folder of the results; with ``fails`` the errors that ended it."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "moka", "--model_args", f"pretrained={run},device=cpu"]
    command += ["--tasks", task, "--include_path", str(include), "--batch_size", "2", "--log_samples"]
    done = subprocess.run(
        [*command, "--output_path", str(folder / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", **environment},
    )
    if fails:
        return done.stdout + done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out"


def write_video(path, seed):
    """A second of random pictures, with a tone."""
    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=5), container.add_stream("aac", rate=16000, layout="mono")
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            frame = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(pictures.encode(None))
        wave = (0.3 * np.sin(np.arange(15360) * (0.05 + 0.05 * seed))).astype(np.float32)
        for at in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, at : at + 1024], format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = 16000, at, Fraction(1, 16000)
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


@pytest.mark.parametrize(
    ("task", "name", "variable"),
    [("ave", "ave", "AVE_ROOT"), ("music_avqa", "music-avqa", "MUSIC_AVQA_ROOT")],
)
def test_published_folders_of_videos_with_sound(trained_run, tmp_path, task, name, variable):
    root = tmp_path / "data"
    shutil.copytree(FIXTURES / name, root)
    source = {"format": name, "root": str(root)}
    samples = list(open_samples(source, "test", require_answer=False))
    for seed, path in enumerate(sorted({path for sample in samples for _, path in media_parts(sample)})):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_video(path, seed)
    out = lmms_eval(trained_run, task, TASKS, tmp_path, **{variable: str(root)})
    (file,) = out.rglob(f"*samples_{task}.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == len(samples) > 0
    loaded = moka.load(trained_run, device="cpu")
    records = []
    for record, sample in zip(sorted(found, key=lambda one: one["doc_id"]), samples, strict=True):
        answer = record["filtered_resps"] if isinstance(record["filtered_resps"], str) else record["filtered_resps"][0]
        chat = before_answer(sample["messages"])
        limit = {"ave": 64, "music_avqa": 16}[task]
        assert answer == loaded.generate_batch([chat], max_new_tokens=limit)[0]
        records.append({**{k: sample[k] for k in ("id", "reference", "category") if k in sample}, "prediction": answer})
    ours = score(name, records, "paper")["overall"]["figures"]["accuracy"]["all"]["value"]
    (results,) = out.rglob("*results.json")
    figures = json.loads(results.read_text())["results"][task]
    assert [value for key, value in figures.items() if "accuracy" in key and "stderr" not in key] == [ours]


def test_the_folder_must_be_named(trained_run, tmp_path):
    assert "AVE_ROOT" in lmms_eval(trained_run, "ave", TASKS, tmp_path, fails=True, AVE_ROOT="")


def test_a_run_is_asked_and_its_answers_are_its_own(trained_run, tmp_path):
    lines = []
    for i in range(5):
        Image.new("L", (28, 28), 40 * i).save(tmp_path / f"{i}.png")
        lines.append({"question": "Which digit is written?", "answer": "one", "image": str(tmp_path / f"{i}.png")})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tiny_utils.py").write_text(
        "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['image'])]\n"
    )
    (tmp_path / "tiny_digits.yaml").write_text(
        textwrap.dedent(f"""
        task: tiny_digits
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
        test_split: test
        output_type: generate_until
        doc_to_visual: !function tiny_utils.visual
        doc_to_text: question
        doc_to_target: answer
        generation_kwargs: {{max_new_tokens: 4, until: ["@"]}}
        metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
        """)
    )
    out = lmms_eval(trained_run, "tiny_digits", tmp_path, tmp_path)
    (samples,) = out.rglob("*samples_tiny_digits.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    loaded = moka.load(trained_run, device="cpu")
    for record, line in zip(sorted(records, key=lambda one: one["doc_id"]), lines, strict=True):
        answer = loaded.generate(line["question"], image=line["image"], max_new_tokens=4)
        found = record["filtered_resps"]
        assert (found if isinstance(found, str) else found[0]).strip() == answer.split("@")[0].strip()
