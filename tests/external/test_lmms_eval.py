"""lmms-eval asks a run by the entry point of its plug-in. `make test-integrations` runs it with the newest lmms-eval."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is in an environment of its own: make test-integrations")

import moka


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
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "moka",
        "--model_args",
        f"pretrained={trained_run},device=cpu",
    ]
    command += ["--tasks", "tiny_digits", "--include_path", str(tmp_path), "--batch_size", "2", "--log_samples"]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("*samples_tiny_digits.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    loaded = moka.load(trained_run, device="cpu")
    for record, line in zip(sorted(records, key=lambda one: one["doc_id"]), lines, strict=True):
        answer = loaded.generate(line["question"], image=line["image"], max_new_tokens=4)
        found = record["filtered_resps"]
        assert (found if isinstance(found, str) else found[0]).strip() == answer.split("@")[0].strip()
