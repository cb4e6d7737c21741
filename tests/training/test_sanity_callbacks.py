"""Checks of a training: what cannot succeed is stopped by name, and what can is never stopped or discarded."""

import json
import wave

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from moka.adapter.layer import MokaLinear
from moka.data import Collator, EncodedDataset
from moka.demo.digit_tasks import EmbeddedTask
from moka.errors import MokaError
from moka.modeling import MokaForConditionalGeneration
from moka.modeling.build import attach_adapter, build_model
from moka.training import config_from_dict
from moka.training import run as run_module
from moka.training.arguments import training_arguments
from moka.training.sanity_callbacks import DivergenceGuard, check_dtypes, logits_change, supervised_type_ids, unreached
from moka.training.trainer import MokaTrainer

SHORT = {"stages": [2], "training__max_steps": 3, "training__save_strategy": "no", "data__validation": None}


@pytest.fixture
def add_callback(monkeypatch):
    """Adds a callback to the next runs."""

    def add(callback):
        own = run_module._callbacks
        monkeypatch.setattr(run_module, "_callbacks", lambda run, stage: [callback, *own(run, stage)])
        return callback

    return add


class Seen(TrainerCallback):
    """step -> ids of its samples; step -> norms of its gradients."""

    def __init__(self):
        self.ids, self.norms = {}, {}

    def on_batch(self, trainer, inputs, sample_ids):
        assert len(sample_ids) == len(inputs["input_ids"])
        self.ids.setdefault(trainer.state.global_step + 1, []).extend(sample_ids)

    def on_gradients(self, trainer, norms):
        self.norms[trainer.state.global_step + 1] = norms()


def test_diverging_run_names_the_first_bad_step_and_its_samples(train, tmp_path, add_callback, monkeypatch):
    """One sample with a broken picture makes the loss NaN, and everything after it, long before the next log."""
    full = EncodedDataset.__getitem__
    seen = add_callback(Seen())
    changes = {
        **SHORT,
        "training__max_steps": 12,
        "training__logging_steps": 6,
        "training__gradient_accumulation_steps": 2,
    }
    train(tmp_path / "healthy", **changes)
    healthy, seen.ids = seen.ids, {}
    broken = healthy[4][5]
    assert sum(broken in ids for ids in healthy.values()) == 1  # an epoch is longer than this run

    def with_a_broken_one(self, index):
        encoded = full(self, index)
        if encoded["sample_id"] == broken:
            for key in ("pixel_values", "input_features"):
                if key in encoded:
                    encoded[key] = np.full_like(encoded[key], np.nan)
        return encoded

    monkeypatch.setattr(EncodedDataset, "__getitem__", with_a_broken_one)
    with pytest.raises(
        MokaError, match=rf"loss was nan at 3 steps.*first at step 4 .*{broken}.*training.learning_rate"
    ):
        train(tmp_path / "run", **changes)
    printed = json.loads((tmp_path / "run/diverged.json").read_text())
    assert [record["step"] for record in printed["steps"]] == [4, 5, 6]
    assert printed["steps"][0]["sample_ids"] == healthy[4][4:]  # of the accumulated batch that has it only
    assert printed["steps"][1]["sample_ids"] == healthy[5]
    assert not (tmp_path / "run/adapter").exists()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 6
    assert records[-1]["loss"] is None


@pytest.mark.parametrize("use", ["save", "eval", "end"])
def test_what_has_diverged_is_reported_before_it_is_used(train, tmp_path, use):
    """Two bad steps only, and none logged: still its samples are named, and not a tensor that is not finite."""
    changes = {**SHORT, "training__learning_rate": 1e30, "training__max_steps": 3, "training__logging_steps": 50}
    if use != "end":
        changes |= {f"training__{use}_strategy": "steps", f"training__{use}_steps": 3, "training__max_steps": 6}
        changes["data__validation"] = "embedded:audio-visual-text"
    with pytest.raises(
        MokaError, match=r"The loss was nan at [12] steps? in a row, first at step [23] with the samples \w"
    ):
        train(tmp_path / "run", **changes)
    assert json.loads((tmp_path / "run/diverged.json").read_text())["steps"]
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_a_loss_of_zero_stops_too_and_one_bad_step_does_not(train, tmp_path, add_callback, monkeypatch):
    step = MokaTrainer.training_step
    factors = iter([1, 0, 0, 1, float("nan"), 1, 0, 0, 0, 1, 1, 1])

    def training_step(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        guard = next(c for c in self.callback_handler.callbacks if isinstance(c, DivergenceGuard))
        when, value, ids = guard.window[-1]
        guard.window[-1] = (when, value * next(factors), ids)
        return loss

    monkeypatch.setattr(MokaTrainer, "training_step", training_step)
    with pytest.raises(MokaError, match=r"loss was 0.0 at 3 steps in a row, first at step 7 .*answers are all masked"):
        train(tmp_path / "run", **{**SHORT, "training__max_steps": 12})


def test_float16_parameters_are_refused_before_training(train, tmp_path, monkeypatch):
    def half(*arguments):
        adapted = attach_adapter(*arguments)
        for name, parameter in adapted.named_parameters():
            if "moka_B" in name:
                parameter.data = parameter.data.half()
        return adapted

    monkeypatch.setattr(run_module, "attach_adapter", half)
    with pytest.raises(MokaError, match=r"4 trainable parameters are float16 \(the first: .*moka_B.*training.bf16"):
        train(tmp_path / "run", **SHORT)
    frozen = torch.nn.Linear(2, 2).half().requires_grad_(False)
    check_dtypes(frozen)


def test_a_projector_cut_off_from_the_graph_is_named(train, tmp_path, monkeypatch):
    full = MokaForConditionalGeneration.encode_media

    def cut(self, name, values):
        return full(self, name, values).detach() if name == "audio" else full(self, name, values)

    monkeypatch.setattr(MokaForConditionalGeneration, "encode_media", cut)
    with pytest.raises(MokaError, match=r"Step 1: no gradient reaches .*projectors\.audio.*") as caught:
        train(tmp_path / "run", **SHORT)
    assert "visual" not in str(caught.value)
    assert not (tmp_path / "run/adapter").exists()


def test_an_adapter_outside_the_forward_is_named(train, tmp_path, monkeypatch):
    monkeypatch.setattr(MokaLinear, "forward", lambda self, x, *args, **kwargs: self.base_layer(x, *args, **kwargs))
    with pytest.raises(MokaError, match=r"Step 1: no gradient reaches .*layers\.0\.self_attn\.q_proj\.moka_A"):
        train(tmp_path / "run", **SHORT)


@pytest.mark.parametrize("changes", [{"adapter__method": "lora"}, {"adapter__adapt": ["visual", "audio"]}])
def test_healthy_variants_pass(train, tmp_path, add_callback, changes):
    seen = add_callback(Seen())
    summary = json.loads((train(tmp_path / "run", **SHORT, **changes) / "summary.json").read_text())
    assert summary["adapter changes logits by"].endswith(" %")
    norms = seen.norms[1]
    up = next(name for name in norms if "moka_B" in name or "lora_B" in name)
    projector = [name for name in norms if ".projectors." in name and ".audio." in name]
    assert unreached(norms, {"visual", "audio"}) == []
    assert unreached({**norms, up: None}, {"visual"}) == [up]
    silent = {**norms, **{key: [0.0] for key in projector}}
    assert (unreached(silent, {"visual"}), len(unreached(silent, {"audio"}))) == ([], 1)


def late_media(folder):
    """Samples whose picture and sound come after the only answer, as in a chat that ends with a user's turn."""
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 8000).astype("<i2").tobytes())
    turns = [("user", "What is seven?"), ("assistant", "seven"), ("user", [{"type": "audio", "audio": "a.wav"}])]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = folder / "late.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "messages": messages}) + "\n" for i in range(8)))
    return path


def test_media_after_the_last_answer_need_no_gradient(train, tmp_path):
    run = train(tmp_path / "run", **SHORT, data__train=str(late_media(tmp_path)), data__train_size=None)
    assert (run / "adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("types", "labels", "positions", "ids"),
    [
        ([0, 1, 0, 0], [-100, -100, 5, 6], None, {0, 1}),
        ([0, 0, 1, 3], [-100, 5, -100, -100], None, {0}),
        ([1, 3, 0, 2], [5, -100, 6, -100], None, {1, 3}),
        ([0, 0, 1, 0, 2, 0], [-100, 5, -100, -100, -100, 6], [0, 1, 2, 0, 1, 2], {0, 2}),  # two samples in a row
        ([0, 1], [-100, -100], None, set()),
    ],
)
def test_only_tokens_before_a_supervised_one_of_their_sample_count(types, labels, positions, ids):
    inputs = {"mm_token_type_ids": torch.tensor([types]), "labels": torch.tensor([labels])}
    if positions is not None:
        inputs["position_ids"] = torch.tensor([positions])
    assert supervised_type_ids(inputs) == ids


def test_an_adapter_on_the_head_trains(train, tmp_path, add_callback, capsys):
    """Media positions give the head no gradient, and the interaction changes them only."""
    seen = add_callback(Seen())
    changes = {"adapter__target_modules": ["q_proj", "lm_head"], "training__per_device_train_batch_size": 2}
    run = train(tmp_path / "run", **{**SHORT, **changes})
    (head,) = [name for name in seen.norms[3] if "lm_head.moka_A" in name]
    text, *media = seen.norms[3][head]
    assert text > 0 == max(media)
    printed = [line for line in capsys.readouterr().out.splitlines() if "of the decoder's block weights" in line]
    assert len(printed) == 1
    share = json.loads((run / "summary.json").read_text())["adapter covers"].partition(" ")[0]
    assert f" {share} " in printed[0]
    # q_proj [64, 64] of k and v [32, 64] each, o [64, 64], gate, up and down [96, 64] each
    assert share == f"{64 / (64 + 2 * 32 + 64 + 3 * 96):.0%}"


def test_change_of_logits_is_the_adapters_only(tiny_config, tmp_path):
    config = config_from_dict(tiny_config(tmp_path / "x"))
    model, processor = build_model(config.model)
    adapted = attach_adapter(model, config.adapter)
    trainer = MokaTrainer(
        model=adapted,
        args=training_arguments({}, tmp_path / "x"),
        train_dataset=EncodedDataset(EmbeddedTask("audio-visual-text", "train", size=4), processor, None),
        data_collator=Collator(processor),
        processing_class=processor,
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".projectors." in name:
                parameter.add_(0.1)  # trained projectors also change the logits, and are none of its doing
    assert logits_change(trainer) == 0.0
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "moka_B" in name:
                parameter.normal_(std=0.1)
    change = logits_change(trainer)
    assert 0 < change < 10
    assert adapted.training is False or trainer.model_wrapped.training == adapted.training


def test_a_result_that_changes_no_logits_is_saved_with_a_warning(train, tmp_path, monkeypatch, capsys):
    """B is not zero, and yet the layers are not in use."""
    monkeypatch.setattr(run_module, "logits_change", lambda trainer: 0.0)
    train(tmp_path / "run", **SHORT)
    assert "warning: the adapter changes the logits" in capsys.readouterr().out
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert (tmp_path / "run/summary.json").exists()


def test_the_change_of_logits_is_measured_on_samples_that_the_adapter_adapts(train, tmp_path):
    """The first samples have no sound, and the adapter adapts nothing else."""
    run = train(tmp_path / "run", **SHORT, adapter__adapt=["audio"], data__train=str(text_first(tmp_path)))
    assert json.loads((run / "summary.json").read_text())["adapter changes logits by"] != "0 %"


def text_first(folder):
    """A data set whose first samples have only text, and the others sound."""
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 8000).astype("<i2").tobytes())
    samples = []
    for index in range(24):
        sound = [] if index < 6 else [{"type": "audio", "audio": "a.wav"}]
        content = [*sound, {"type": "text", "text": "What is heard?"}]
        samples.append(
            {
                "id": str(index),
                "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "one"}],
            }
        )
    path = folder / "text_first.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


BREAK_ONE = """
import sys
import numpy as np
from moka.cli.main import main
from moka.data import EncodedDataset

full = EncodedDataset.__getitem__

def with_a_broken_one(self, index):
    encoded = full(self, index)
    if encoded["sample_id"] == sys.argv[1]:
        encoded |= {k: np.full_like(v, np.nan) for k, v in encoded.items() if k in ("pixel_values", "input_features")}
    return encoded

EncodedDataset.__getitem__ = with_a_broken_one
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_processes_name_the_samples_of_both(train, tiny_config, tmp_path, add_callback, launch, write_yaml):
    seen = add_callback(Seen())
    changes = {**SHORT, "training__max_steps": 8, "training__logging_steps": 4}
    train(tmp_path / "healthy", **changes)
    script = tmp_path / "broken.py"
    script.write_text(BREAK_ONE)
    broken = seen.ids[2][3]
    config = write_yaml(
        tmp_path / "run.yaml", tiny_config(tmp_path / "run", **changes, training__per_device_train_batch_size=2)
    )
    done = launch("torchrun", broken, "train", config, program=(script,))
    assert done.returncode != 0
    printed = [line for line in done.stderr.splitlines() if "moka: error: The loss was nan" in line]
    assert len(printed) == 1, done.stderr[-3000:]
    assert broken in printed[0]
    assert "DistributedDataParallel" in done.stdout
    steps = json.loads((tmp_path / "run/diverged.json").read_text())["steps"]
    assert [record["step"] for record in steps] == [2, 3, 4]
    # Of the process whose batch was broken at first; then the gradients of both are.
    assert len(steps[0]["sample_ids"]) == 2
    assert broken in steps[0]["sample_ids"]
    assert sorted(steps[1]["sample_ids"]) == sorted(seen.ids[3])
