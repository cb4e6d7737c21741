"""TRL's trainers train a MokA adapter as they train LoRA, on vision-language models and pictures, without MokA's help."""

import math
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

trl = pytest.importorskip("trl", minversion="1.16")
from datasets import Dataset  # noqa: E402
from peft import PeftModel  # noqa: E402

import moka  # noqa: E402
from moka.balance import (  # noqa: E402
    CML,
    OGM,
    BalanceCallback,
    BalancedTrainerMixin,
    LearningRates,
    ParetoB,
)

QUESTIONS = ["which colour is this picture", "is this red", "which one is that", "is it grey and blue or is it green"]
ANSWERS = ["red", "it is green", "blue", "it is the grey one"]
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(autouse=True)
def warnings_of_moka_are_errors():
    """Fail at any warning of moka, such as an unrouted call or a question that was not found."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"(?i).*(moka|rout|interaction|marker|question)")
        yield


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def prompt_completion(pictures, every=1):
    """Rows of one question, one answer and, every so many rows, one picture."""
    columns = {"prompt": [user(text) for text in QUESTIONS], "completion": [assistant(text) for text in ANSWERS]}
    columns["images"] = [[] if i % every else [picture] for i, picture in enumerate(pictures)]
    return Dataset.from_dict(columns)


def conversations(pictures):
    """Rows of two turns, with a picture in each."""
    rows = []
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        turns = [(question, answer), (QUESTIONS[i - 1], ANSWERS[i - 1])]
        messages = []
        for asked, answered in turns:
            parts = [{"type": "image", "text": None}, {"type": "text", "text": asked}]
            messages += [{"role": "user", "content": parts}]
            messages += [{"role": "assistant", "content": [{"type": "text", "text": answered}]}]
        rows.append({"messages": messages, "images": [pictures[i], pictures[i - 1]]})
    return Dataset.from_list(rows)


def some_without_pictures(pictures):
    return prompt_completion(pictures, every=2)


def record(model):
    """Keep what each call of ``model`` with TRL's fused head was given, and what it returned."""
    calls = []

    def keep(module, args, inputs, outputs):
        if "fused_lm_head" in inputs:
            inputs = {name: value for name, value in inputs.items() if name not in ("fused_lm_head", "use_cache")}
            calls.append({"inputs": inputs, "log_probs": outputs.log_probs})

    model.register_forward_hook(keep, with_kwargs=True)
    return calls


def train(trainer, method, pictures_seen=True):
    """Train, and check what moved. Return the adapter as it was, the policy's first call, and the log of each step."""
    before, calls = method.weights(trainer.model), record(trainer.model)
    trainer.train()
    after = method.weights(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert method.visual_changed(before, after) == (pictures_seen or method.name == "lora")
    # Calls without gradients are the reference's; with label smoothing, TRL calls its fused head for its metrics only.
    first = next((call for call in calls if call["log_probs"].requires_grad), calls[0])
    return before, first, [entry for entry in trainer.state.log_history if "loss" in entry]


def log_probabilities(model, inputs):
    """Return each supervised next token's log-probability, else 0, from the logits of the model's public forward."""
    labels = inputs["labels"][:, 1:]
    logits = model(**{n: v for n, v in inputs.items() if n != "labels"}, use_cache=False).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(labels == -100, 0.0)


def check_step(step, model, inputs):
    """Compare the log-probabilities of TRL's first step with those of ``model`` with explicit ids."""
    expected = log_probabilities(model, inputs).detach()
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(step["log_probs"].detach(), expected, atol=1e-5, rtol=1e-5)


def nll(model, inputs, smoothing=0.0):
    """Return the mean loss of the supervised tokens."""
    logits = model(**{n: v for n, v in inputs.items() if n != "labels"}, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=smoothing).item()


def at_start(method, family, weights):
    """Return a new model, which TRL never touched, with ``weights`` as its adapter."""
    model = method.attach(family)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model.train()


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        pytest.param(prompt_completion, {}, id="prompt-completion"),
        pytest.param(some_without_pictures, {"per_device_train_batch_size": 4}, id="some without pictures"),
        pytest.param(conversations, {}, id="messages, everything supervised"),
        pytest.param(conversations, {"assistant_only_loss": True}, id="messages, answers supervised"),
        pytest.param(prompt_completion, {"label_smoothing_factor": 0.1}, id="label smoothing"),
        pytest.param(prompt_completion, {"gradient_checkpointing": False}, id="no checkpointing"),
        pytest.param(
            prompt_completion, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, id="reentrant checkpointing"
        ),
    ],
)
def test_sft(family, method, pictures, tmp_path, data, settings):
    trainer = trl.SFTTrainer(
        family.build(),
        trl.SFTConfig(str(tmp_path), **{**SETTINGS, **settings}),
        train_dataset=data(pictures),
        processing_class=family.processor,
        peft_config=method.config(family),
    )
    method.trained_(trainer.model)
    before, step, log = train(trainer, method)

    model, inputs = at_start(method, family, before), method.inputs(family, step["inputs"])
    check_step(step, model, inputs)
    loss = nll(model, inputs, settings.get("label_smoothing_factor", 0.0))
    assert log[0]["loss"] == pytest.approx(loss, abs=1e-5)
    if method.name == "moka":  # the interaction is part of that
        unasked = {**inputs, "interaction_ids": torch.zeros_like(inputs["input_ids"])}
        assert (log_probabilities(model.eval(), unasked) - step["log_probs"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="padded"),
        pytest.param({"packing": True, "max_length": 160}, id="packed"),
        pytest.param({"padding_free": True, "max_length": None}, id="padding-free"),
    ],
)
def test_sft_of_text_only(family, method, pictures, tmp_path, settings):
    """TRL packs no pictures: text is what it can pack for a vision-language model."""
    trainer = trl.SFTTrainer(
        family.build(),
        trl.SFTConfig(str(tmp_path), **{**SETTINGS, **settings}),
        train_dataset=prompt_completion(pictures).remove_columns("images"),
        processing_class=family.processor,
        peft_config=method.config(family),
    )
    method.trained_(trainer.model)
    before, step, log = train(trainer, method, pictures_seen=False)

    several_in_a_row = settings.get("packing") or settings.get("padding_free")
    assert ("cu_seq_lens_q" in step["inputs"]) == bool(several_in_a_row)
    model, inputs = at_start(method, family, before), method.inputs(family, step["inputs"])
    check_step(step, model, inputs)
    assert log[0]["loss"] == pytest.approx(nll(model, inputs), abs=1e-5)


def preferences(pictures):
    columns = {"prompt": [user(text) for text in QUESTIONS], "chosen": [assistant(text) for text in ANSWERS]}
    columns["rejected"] = [assistant(text) for text in reversed(ANSWERS)]
    return Dataset.from_dict({**columns, "images": [[picture] for picture in pictures]})


@pytest.mark.parametrize("start", ["new adapter", "trained adapter"])
def test_dpo(family, method, pictures, tmp_path, start):
    new = start == "new adapter"
    trainer = trl.DPOTrainer(
        # TRL sets the rate of every dropout to 0: without that, policy and reference would differ.
        family.build() if new else method.attach(family, **{method.dropout: 0.5}),
        args=trl.DPOConfig(str(tmp_path), **{**SETTINGS, "max_steps": 3}),
        train_dataset=preferences(pictures),
        processing_class=family.processor,
        peft_config=method.config(family) if new else None,
    )
    before, step, log = train(trainer, method)

    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy starts as the reference
    assert abs(log[-1]["loss"] - math.log(2)) > 1e-3
    check_step(step, at_start(method, family, before), method.inputs(family, step["inputs"]))
    if not new:
        reference = method.weights(trainer.model, "ref")
        copied = {name.replace(".default", ".ref"): value for name, value in before.items()}
        assert reference.keys() == copied.keys()
        assert all(torch.equal(reference[name], copied[name]) for name in copied)


@pytest.mark.parametrize("start", ["new adapter", "trained adapter"])
def test_grpo(family, method, pictures, tmp_path, start):
    new = start == "new adapter"
    rewards = []

    def alternating(completions, **_):
        rewards.extend(float(i % 2) for i in range(len(completions)))
        return rewards[-len(completions) :]

    not_answers = family.ids("<|image_pad|><|video_pad|><image>")  # a random model would write them
    settings = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "temperature": 1.0}
    trainer = trl.GRPOTrainer(
        family.build() if new else method.attach(family),
        reward_funcs=alternating,
        args=trl.GRPOConfig(
            str(tmp_path), **{**SETTINGS, **settings}, generation_kwargs={"suppress_tokens": not_answers}
        ),
        train_dataset=prompt_completion(pictures).remove_columns("completion"),
        processing_class=family.processor,
        peft_config=method.config(family) if new else None,
    )
    if new:
        method.trained_(trainer.model)
    before, step, log = train(trainer, method)
    assert rewards
    assert len(log) == SETTINGS["max_steps"]
    check_step(step, at_start(method, family, before), method.inputs(family, step["inputs"]))
    if not new:  # the reference is a copy of the policy
        assert log[0]["kl"] == pytest.approx(0.0, abs=1e-5)


def test_saved_by_a_trainer_and_loaded(family, method, pictures, tmp_path):
    trainer = trl.SFTTrainer(
        family.build(),
        trl.SFTConfig(str(tmp_path), **SETTINGS),
        train_dataset=prompt_completion(pictures),
        processing_class=family.processor,
        peft_config=method.config(family),
    )
    _, step, _ = train(trainer, method)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(family.build(), tmp_path / "saved").eval()
    expected = log_probabilities(trainer.model.eval(), step["inputs"])
    torch.testing.assert_close(log_probabilities(loaded, step["inputs"]), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def batch(family, pictures):
    """Return what TRL's collator makes of all rows, with every token supervised."""
    collate = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(family.processor)
    return dict(collate([dict(row) for row in prompt_completion(pictures)]))


def check_gradients(method, model, logits, batch, expected):
    """Compare the loss with ``expected``, and see that A of the pictures' tokens gets a gradient from it."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    row = 1 if method.name == "moka" else slice(None)
    gradients = [p.grad[row] for n, p in model.named_parameters() if f"{method.name}_A" in n and ".layers.0." in n]
    assert gradients
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_a_forward_replaced_after_attaching_is_routed(family, method, batch):
    """TRL's fused head, Liger and accelerate replace the forward of the model that has the adapter."""
    model = method.attach(family).train()
    expected = nll(model, method.inputs(family, batch))

    def own_forward(self, labels=None, **inputs):
        return self.lm_head(self.model(**inputs)[0])

    base = model.get_base_model()
    base.forward = types.MethodType(own_forward, base)
    check_gradients(method, model, model(**batch), batch, expected)


@pytest.mark.parametrize("method", ["moka"], indirect=True)
def test_a_call_of_the_decoder_only_is_routed(family, method, batch):
    """A loss of one's own that calls the model's parts never calls the model that has the adapter."""
    model = method.attach(family).train()
    base, ids = model.get_base_model(), family.explicit(batch["input_ids"])
    expected = nll(model, method.inputs(family, batch))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = base.lm_head(base.model(**inputs)[0])
    check_gradients(method, model, logits, batch, expected)
    model.zero_grad()
    with moka.routing(model, **ids):
        logits = base.lm_head(base.model(**inputs)[0])
        check_gradients(method, model, logits, batch, expected)


@pytest.mark.parametrize("method", ["moka"], indirect=True)
@pytest.mark.parametrize("how", ["mixin", "callback"])
def test_sft_with_balance_strategies(family, method, pictures, tmp_path, how):
    """Strategies that need one modality beside text, in TRL's trainer as it is, and with the mixin before it."""

    class Balanced(BalancedTrainerMixin, trl.SFTTrainer):
        pass

    fixed, pareto = LearningRates({"visual": 0.5}), ParetoB()
    ours = {"balance": [OGM(ablate="adapter", every=1), CML(), pareto]}
    settings = {"callbacks": [BalanceCallback(fixed, pareto)]} if how == "callback" else ours
    trainer = (trl.SFTTrainer if how == "callback" else Balanced)(
        family.build(),
        trl.SFTConfig(str(tmp_path), **SETTINGS),
        train_dataset=prompt_completion(pictures),
        processing_class=family.processor,
        peft_config=method.config(family),
        **settings,
    )
    method.trained_(trainer.model)
    _, _, log = train(trainer, method)
    assert all(math.isfinite(entry["loss"]) for entry in log)
    if how == "mixin":
        assert {"balance/ogm/text", "balance/ogm/visual", "balance/cml/violations"} <= log[0].keys()
        assert min(log[0]["balance/ogm/text"], log[0]["balance/ogm/visual"]) < 1
