"""Seventy wrong commands: each ends with code 2 and one clear line that names what was given."""

import shutil

import pytest

FILES = {
    "ok.jsonl": '{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]},{"role":"assistant","content":"a"}]}',
    "bad.jsonl": '{"messages": [}',
    "media.jsonl": '{"messages":[{"role":"user","content":[{"type":"image","image":"x.png"}]},{"role":"assistant","content":"a"}]}',
    "escape.jsonl": '{"messages":[{"role":"user","content":[{"type":"image","image":"../../p"}]},{"role":"assistant","content":"a"}]}',
    "role.jsonl": '{"messages":[{"role":"robot","content":"x"},{"role":"assistant","content":"a"}]}',
    "type.jsonl": '{"messages":[{"role":"user","content":[{"type":"smell","smell":"x"}]},{"role":"assistant","content":"a"}]}',
    "empty.jsonl": "",
    "array.jsonl": "[1,2]",
    "deep.jsonl": "[" * 100_000,
    "number.jsonl": '{"id": ' + "9" * 6000 + "}",
    "dup.yaml": "training: {max_steps: 1}\ntraining: {max_steps: 2}",
    "tab.yaml": "training:\n\tmax_steps: 1",
    "bomb.yaml": "data: &a {train: x}\n" + "\n".join(f"k{i}: &b{i} [*a, *a, *a]" for i in range(3)),
    "list.yaml": "- a",
    "loop.yaml": "base: loop.yaml",
    "picture.png": "not a picture",
    "predictions.jsonl": '{"id":"a"}',
    "afile": "x",
}
SETTINGS = """
training.learning_rat=1|learning_rate
training.learning_rate=fast|training.learning_rate 'fast'
training.learning_rate=.nan|training.learning_rate nan
training.max_steps=0|training.max_steps 0
adapter.r=0|adapter.r 0
adapter.r=-4|adapter.r -4
adapter.alpha=.inf|adapter.alpha inf
adapter.dropout=1.5|adapter.dropout 1.5
adapter.target_modules=[nothing]|target_modules nothing q_proj
adapter.method=dorra|adapter.method dora moka
model.backbone=nothere|model.tiny nothere
data.train=nothere.jsonl|nothere.jsonl
data.train=[null]|data None
data.train=embedded:nothing|nothing visual-text
data.train=bad.jsonl|bad.jsonl:1
data.train=escape.jsonl|escape.jsonl:1 ../../p
data.train=media.jsonl|media.jsonl:1 x.png
data.train=role.jsonl|role.jsonl:1 robot user
data.train=type.jsonl|type.jsonl:1 smell image
data.train=empty.jsonl|empty.jsonl
data.train=latin.jsonl|latin.jsonl:1 UTF-8
data.train=deep.jsonl|deep.jsonl:1
data.train=number.jsonl|number.jsonl:1
data.on_bad_media=ignore|data.on_bad_media ignore skip
data.video_frames=0|data.video_frames 0 1
training.optim=nothing|nothing adamw_torch
training.lr_scheduler_type=zigzag|zigzag cosine
training.eval_strategy=steps data.validation=null|training.eval_strategy data.validation
training.adam_beta1=2|adam_beta1 2
training.deepspeed=nothere.json|deepspeed launcher
stages=[3]|stages [3] [1, 2]
nonsense|nonsense section.key=value
a.b=1|a:
"""
COMMANDS = """
train|configs/
train nothere.yaml|nothere.yaml
train ok.jsonl|ok.jsonl data.train
train quickstart/visual|quickstart/visual_text
train dup.yaml|dup.yaml training line
train tab.yaml|tab.yaml line 2
train bomb.yaml|bomb.yaml
train list.yaml|list.yaml mapping
train loop.yaml|loop.yaml base
train binary.yaml|binary.yaml
train emptydir|emptydir
eval nothere|nothere
eval emptydir|emptydir config.yaml
eval RUN --data nothere.jsonl|nothere.jsonl
eval RUN --benchmark nothing|nothing music-avqa
eval RUN --root x|--root --benchmark
eval RUN --size 0|--size 0
eval RUN --batch-size x|--batch-size x
generate RUN --image picture.png q|picture.png PNG
generate RUN --image nothere.png q|nothere.png
generate RUN --decoding magic q|magic fork-merge
generate emptydir q|emptydir adapter_config.json
merge RUN --output RUN|--output
merge emptydir --output m|emptydir
export RUN --format gguf --output m|gguf lora
convert emptydir --output m|emptydir adapter_model
convert nothere --output m|nothere
data check bad.jsonl|bad.jsonl data.train
data check nothere.yaml|nothere.yaml
data convert --format nothing --root emptydir --output c|nothing ave
data formats nothing|nothing ave
score pope nothere.jsonl|nothere.jsonl
score nothing predictions.jsonl|nothing pope
score pope predictions.jsonl|predictions.jsonl:1 prediction
compare quickstart/visual_text --methods lora,nothing|--methods nothing moka
compare quickstart/visual_text --seeds 0|--seeds 0
cache nothere.yaml|nothere.yaml
diagnose nothere|--data nothere
diagnose RUN --ablate x|ablate x blank
diagnos RUN|diagnos diagnose
--nothing|COMMAND
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text + "\n" if text else "")
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages":[{"role":"user","content":"\xe9"}]}\n')
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "emptydir").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(done, words, folder, before):
    lines = [line for line in done.err.splitlines() if line.startswith("moka") and "error" in line]
    assert done.code == 2, (done.code, done.err[-500:])
    assert len(lines) == 1
    assert "Traceback" not in done.err
    assert all(word in lines[0] for word in words.split()), lines[0]
    assert sorted(path.name for path in folder.iterdir()) == before  # nothing was made or lost


@pytest.mark.slow
@pytest.mark.parametrize("case", SETTINGS.strip().splitlines())
def test_wrong_settings_are_one_clear_line(moka, folder, case):
    settings, _, words = case.partition("|")
    before = sorted(path.name for path in folder.iterdir())
    done = moka("train", "quickstart/visual_text", "--tiny", "output.dir=o", *settings.split())
    shutil.rmtree(folder / "o-tiny", ignore_errors=True)
    check(done, words, folder, before)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMANDS.strip().splitlines())
def test_wrong_commands_are_one_clear_line(moka, folder, trained_run, case):
    command, _, words = case.partition("|")
    before = sorted(path.name for path in folder.iterdir())
    check(moka(*command.replace("RUN", str(trained_run)).split()), words, folder, before)
