"""The head sees the supervised positions only, row by row, and nothing else of the training changes."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
)

from moka import MokaConfig, MokaForConditionalGeneration
from moka.modeling.configuration import MokaModelConfig
from moka.modeling.logits import supervised_places

VOCAB, WIDTH, SEQ = 64, 32, 12
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE = {"type": "conv-image", "image_size": 8, "channels": [4, 4], "width": 8, "num_tokens": 2, "dropout": 0.0}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
BACKBONES = {
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen2.5-vl": Qwen2_5_VLTextConfig(**SHAPE, rope_parameters=ROPE, tie_word_embeddings=False),
    # What comes after the head: soft-capping, a factor, a divisor.
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": GraniteConfig(**SHAPE, logits_scaling=3.0),
    # Heads of other names.
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "opt": OPTConfig(**{**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "dropout": 0.0}),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=4),
}


def composed(text_config):
    torch.manual_seed(0)
    modalities = {"visual": {"encoder": IMAGE, "projector": {"type": "linear"}}}
    model = MokaForConditionalGeneration(MokaModelConfig(copy.deepcopy(text_config), modalities))
    for parameter in model.language_model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.2)
    return model.train()


def adapted(model, config=None):
    torch.manual_seed(1)
    parts = ["encoders.visual", "projectors.visual"]
    default = MokaConfig(dropout=0.0, init_weights=False, target_modules=["q_proj", "v_proj"], modules_to_save=parts)
    return get_peft_model(model, config or default).train()


@pytest.fixture
def batch():
    """Four rows whose answers are in different columns: of the union of columns most would be computed in vain."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (4, SEQ), generator=generator)
    ids[:, 1:3] = VOCAB  # a picture of two tokens
    labels = torch.full_like(ids, -100)
    for row, columns in enumerate([(4, 5), (7, 8, 9), (10,), (3, 11)]):
        labels[row, list(columns)] = ids[row, list(columns)]
    question = torch.zeros_like(ids, dtype=torch.bool)
    question[:, 0] = True
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "question_mask": question,
        "pixel_values": torch.randn(4, 1, 8, 8, generator=generator),
    }


def seen_by_head(model):
    """Rows of hidden states that the head computes logits of, forward by forward."""
    rows = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(output.shape[:-1].numel())
    )
    return rows


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_full(model, batch, items=None):
    """The loss and the gradients by way of the logits of every position."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    loss = losses / (items if items else (batch["labels"][:, 1:] != -100).sum())
    loss.backward()
    return loss.detach(), gradients(model)


def check(model, batch, **how):
    expected, due = in_full(model, batch)
    rows = seen_by_head(model)
    out = model(**batch, **how)
    out.loss.backward()
    assert rows == [8]
    torch.testing.assert_close(out.loss.detach(), expected, atol=1e-6, rtol=1e-6)
    found = gradients(model)
    assert found.keys() == due.keys()
    assert len(found) > 4
    assert any(bool(grad.any()) for grad in due.values())
    for name, grad in due.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6 * max(1.0, float(grad.abs().max())), rtol=0, msg=name)
    return out


@pytest.mark.parametrize("name", BACKBONES)
def test_logits_of_every_supervised_position_and_of_no_other(batch, name):
    out = check(composed(BACKBONES[name]), batch)
    assert out.logits.shape == (1, 8, VOCAB)
    assert out.past_key_values is None  # no one reads it


@pytest.mark.parametrize("config", ["moka", "head saved", "lora"])
@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "qwen2.5-vl"])
def test_with_an_adapter(batch, name, config):
    parts = ["encoders.visual", "projectors.visual"]
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=parts)
    head = MokaConfig(dropout=0.0, init_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = adapted(composed(BACKBONES[name]), {"moka": None, "head saved": head, "lora": lora}[config])
    check(model, batch, loss_only=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(batch, reentrant):
    model = adapted(composed(BACKBONES["llama, tied"]))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    check(model, batch)


def test_packed_rows(batch):
    batch["position_ids"] = torch.tensor([[*range(6), *range(6)]] * 4)
    batch["labels"][:, 6] = -100
    for name in ("qwen2", "qwen2.5-vl"):
        check(adapted(composed(BACKBONES[name])), batch)


def test_an_adapter_on_the_head_is_routed_by_every_position(batch):
    model = adapted(
        composed(BACKBONES["qwen2"]), MokaConfig(dropout=0.0, init_weights=False, target_modules=["lm_head"])
    )
    expected, due = in_full(model, batch)
    out = model(**batch)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected, atol=1e-6, rtol=1e-6)
    assert out.logits.shape == (1, 8, VOCAB)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, due[name], atol=1e-6, rtol=1e-5)


def test_a_head_that_is_no_module_of_its_own(batch):
    """Return what such a model returns is cut after it."""
    model = composed(BACKBONES["qwen2"])
    head = model.language_model.lm_head
    expected, _ = in_full(model, batch)
    model.language_model.get_output_embeddings = lambda: None
    out = model(**batch)
    torch.testing.assert_close(out.loss.detach(), expected, atol=1e-6, rtol=1e-6)
    assert out.logits.shape == (1, 8, VOCAB)
    assert not head._forward_pre_hooks


def test_evaluation_and_generation_are_as_before(batch):
    model = composed(BACKBONES["llama, tied"])
    trained = model(**batch).loss
    rows = seen_by_head(model)
    model.eval()
    evaluated = model(**batch)
    assert evaluated.logits.shape == (4, SEQ, VOCAB)
    torch.testing.assert_close(evaluated.loss, trained, atol=1e-6, rtol=1e-6)
    single = model(**batch, loss_only=True)
    assert single.logits is None
    torch.testing.assert_close(single.loss, trained, atol=1e-6, rtol=1e-6)
    assert rows == [4 * SEQ, 8]
    model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert rows[2:] == [4, 4, 4]


def test_an_error_in_the_model_leaves_no_cut_after(batch, monkeypatch):
    model = composed(BACKBONES["qwen2"])
    model(**batch)

    def fail(*arguments):
        raise RuntimeError("out of memory")

    handle = model.language_model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**batch)
    handle.remove()
    batch.pop("labels")
    assert model(**batch).logits.shape == (4, SEQ, VOCAB)


def test_a_head_put_in_later_is_cut_too_and_the_old_one_left_only(batch):
    model = composed(BACKBONES["qwen2"])
    model(**batch)
    old = model.get_output_embeddings()
    model.set_output_embeddings(torch.nn.Linear(WIDTH, VOCAB, bias=False))
    check(model, batch)
    assert not old._forward_pre_hooks


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_cuts_its_own_head(batch, how):
    model = composed(BACKBONES["qwen2"])
    model(**batch)
    other = how(model)
    assert len(other.get_output_embeddings()._forward_pre_hooks) == 1
    rows = seen_by_head(model)
    check(other, batch)
    assert rows == []


def test_places_are_found_row_by_row(batch):
    assert supervised_places(batch["labels"]).tolist() == [3, 4, 12 + 6, 12 + 7, 12 + 8, 24 + 9, 36 + 2, 36 + 10]


def test_rows_without_an_answer_and_a_batch_without_any(batch):
    model = composed(BACKBONES["qwen2"])
    batch["labels"][1:] = -100
    rows = seen_by_head(model)
    model(**batch).loss.backward()
    batch["labels"][:] = -100
    loss = model(**batch, num_items_in_batch=torch.tensor(3)).loss
    assert rows == [2, 0]
    assert loss == 0
    loss.backward()  # another process may have answers, and waits for these gradients


def test_no_class_of_transformers_is_assumed():
    """Every backbone above is one that `AutoModelForCausalLM` builds, or ours."""
    for name, config in BACKBONES.items():
        if name != "qwen2.5-vl":
            assert AutoModelForCausalLM.from_config(config).get_output_embeddings() is not None
