"""`moka recipes`: the shipped configurations are listed, copied with all their values, and valid by their own schema."""

import json
import os
import subprocess
import sys

import jsonschema
import pytest
import transformers

from moka.cli.main import main
from moka.config import json_schema, load_config
from moka.yaml_files import config_names, configs_folder, find_config, load_yaml, read_config

SCHEMA = configs_folder() / "moka.schema.json"


def test_list_names_every_shipped_run(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(config_names())]] == config_names()
    row = next(line.split() for line in lines if line.startswith("llama2_7b/speech_text/stage2"))
    assert row == ["llama2_7b/speech_text/stage2", "audio-text", "2", "meta-llama/Llama-2-7b-chat-hf", "a", "GPU"]


def test_list_imports_no_torch():
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, "-m", "moka", "recipes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "moka.yaml_files" in imported
    assert not imported & {"torch", "transformers", "peft"}


def test_quickstart_is_a_name():
    assert load_config("quickstart") == load_config("quickstart/audio_visual_text")


@pytest.mark.parametrize(
    "name", ["quickstart", "llama2_7b/visual_text/stage2", "qwen3_vl_8b/visual_text/llava_instruct"]
)
def test_a_copy_is_the_same_run_without_its_bases(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", name, "mine.yaml"]) == 0
    assert "base" not in load_yaml((tmp_path / "mine.yaml").read_text())
    assert load_config("mine.yaml") == load_config(name)
    assert (tmp_path / "mine.yaml").read_text().startswith("# yaml-language-server: $schema=moka.schema.json\n")
    assert json.loads((tmp_path / "moka.schema.json").read_text()) == json_schema()


def test_a_copy_replaces_nothing_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert main(["recipes", "copy", "quickstart"]) == 2
    assert "quickstart.yaml is there" in capsys.readouterr().err
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    assert main(["recipes", "copy", "quickstart", "--overwrite"]) == 0
    assert load_config("quickstart.yaml") == load_config("quickstart")


@pytest.mark.parametrize(("words", "said"), [(["copy"], "name a configuration"), (["copy", "quickstrt"], "quickstart")])
def test_a_wrong_name_is_told(words, said, capsys):
    assert main(["recipes", *words]) == 2
    assert said in capsys.readouterr().err


def test_shipped_files_are_valid_by_the_schema_that_they_name():
    schema = json_schema()
    for name in config_names():
        path = find_config(name)
        head = path.read_text().splitlines()[0]
        assert (path.parent / head.partition("$schema=")[2]).resolve() == SCHEMA.resolve(), name
        jsonschema.validate(read_config(path), schema)
    if transformers.__version__ in json.loads(SCHEMA.read_text())["$comment"]:
        assert json.loads(SCHEMA.read_text()) == schema, "moka recipes schema > configs/moka.schema.json"


@pytest.mark.parametrize(
    "wrong",
    [
        {"modle": {}},
        {"training": {"lerning_rate": 1e-4}},
        {"training": {"learning_rate": "1e-4"}},
        {"model": {"dtype": "float8"}},
        {"data": {"video_frames": 0}},
        {"stages": 2},
    ],
)
def test_the_schema_refuses_what_the_run_would(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json_schema())
