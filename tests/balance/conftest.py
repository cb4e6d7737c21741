"""A tiny random composed model with a MokA adapter, batches of pictures and sound, and trainers over them."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import moka
from moka.balance import BalancedTrainer
from moka.modeling import MokaModelConfig

IMAGE, SOUND = 1, 3
IDS = {"visual": (IMAGE, 2), "audio": (SOUND, 3)}  # token type, tokens of one medium


def make_model(seed=0, media=("visual", "audio"), **adapter):
    """A model whose adapter has left its start: B is not zero."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    image = {"type": "conv-image", "image_size": 8, "channels": [4, 4], "width": 8, "num_tokens": 2, "dropout": 0.0}
    sound = {"type": "conv-audio", "frames": 8, "channels": [6], "width": 8, "num_tokens": 3, "dropout": 0.0}
    known = {
        "visual": {"encoder": image, "projector": {"type": "linear"}},
        "audio": {"encoder": sound, "projector": {"type": "linear"}},
    }
    config = MokaModelConfig(text, {name: known[name] for name in media})
    base = moka.MokaForConditionalGeneration(config, LlamaForCausalLM(text))
    for projector in base.projectors.values():
        projector.output.weight.data.normal_(std=0.4)
    settings = {"r": 4, "task_type": "CAUSAL_LM", "dropout": 0.0, "init_weights": False, **adapter}
    model = get_peft_model(base, moka.MokaConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "moka_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def make_sample(model, number, media=("visual", "audio")):
    """One sample: its media, a question of three tokens, an answer of two."""
    drawn = torch.Generator().manual_seed(100 + number)
    inner = model.get_base_model()
    ids, types = [1], [0]
    sample = {"id": f"s{number}"}
    for name in media:
        kind, tokens = IDS[name]
        ids += [inner.config.placeholder_id(kind)] * tokens
        types += [kind] * tokens
        shape = inner.encoders[name].dummy_input(1).shape[1:]
        sample[inner.encoders[name].input_name] = torch.randn(shape, generator=drawn)
    question = torch.randint(2, 60, (3,), generator=drawn).tolist()
    answer = torch.randint(2, 60, (2,), generator=drawn).tolist()
    groups = [0] + [1] * (len(ids) - 1 + 3) + [0, 0]
    labels = [-100] * (len(ids) + 3) + answer
    return {
        **sample,
        "input_ids": [*ids, *question, *answer],
        "mm_token_type_ids": [*types, 0, 0, 0, 0, 0],
        "interaction_ids": groups,
        "labels": labels,
    }


def collate(samples):
    """Left-padded, as moka's own collator."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    padding = {"input_ids": 0, "mm_token_type_ids": 0, "interaction_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([[fill] * (longest - len(s[name])) + s[name] for s in samples])
        for name, fill in padding.items()
    }
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch["attention_mask"] = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    for name in ("pixel_values", "input_features"):
        given = [sample[name] for sample in samples if name in sample]
        if given:
            batch[name] = torch.stack(given)
    batch["sample_ids"] = [sample["id"] for sample in samples]
    return batch


def make_data(model, size=16, kinds=(("visual", "audio"),)):
    return [make_sample(model, number, kinds[number % len(kinds)]) for number in range(size)]


def make_trainer(
    folder,
    balance=(),
    model=None,
    data=None,
    trainer_class=BalancedTrainer,
    callbacks=None,
    eval_dataset=(),
    **settings,
):
    """A trainer over eight steps of four samples; keyword arguments are ``TrainingArguments``."""
    model = make_model() if model is None else model
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "max_grad_norm": 0.0,
    }
    keywords = {"balance": balance} if balance is not None else {}
    return trainer_class(
        model=model,
        args=TrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=make_data(model) if data is None else data,
        eval_dataset=(make_data(model, 8) if data is None else data) if eval_dataset == () else eval_dataset,
        data_collator=collate,
        callbacks=callbacks,
        **keywords,
    )


def weights(model: nn.Module):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def rows(model: nn.Module, part="moka_A"):
    """layer -> the stacked weight."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{part}." in name}


@pytest.fixture
def model():
    return make_model()


class Kit:
    make_model = staticmethod(make_model)
    make_sample = staticmethod(make_sample)
    make_data = staticmethod(make_data)
    make_trainer = staticmethod(make_trainer)
    collate = staticmethod(collate)
    weights = staticmethod(weights)
    rows = staticmethod(rows)


@pytest.fixture(scope="session")
def kit():
    """Makers of models, samples, batches and trainers."""
    return Kit
