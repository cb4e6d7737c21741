"""Heads other than next-token prediction, and embeddings tied to the head."""

import warnings

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)

import moka
from moka.adapter import MokaLinear

HEADS = {
    "SEQ_CLS": (LlamaForSequenceClassification, "score"),
    "TOKEN_CLS": (LlamaForTokenClassification, "score"),
    "QUESTION_ANS": (LlamaForQuestionAnswering, "qa_outputs"),
}


def backbone(tiny, model_class, **changes):
    config = tiny.backbone("qwen2" if model_class.__name__.startswith("Qwen2") else "llama").config
    config.num_labels = 3
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return model_class(config).eval()


def labels(task, batch):
    rows, width = batch.input_ids.shape
    return {
        "SEQ_CLS": {"labels": torch.arange(rows) % 3},
        "TOKEN_CLS": {"labels": batch.input_ids % 3},
        "QUESTION_ANS": {"start_positions": torch.zeros(rows).long(), "end_positions": torch.full((rows,), width - 1)},
    }[task]


def result(model, batch):
    model.eval()
    with torch.no_grad():
        got = model(**batch.kwargs())
    return next(iter(got.values()))


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", ["default", "other"])
def test_heads_are_trained_saved_and_restored(tiny, batch, tmp_path, task, name):
    model_class, head = HEADS[task]
    model = tiny.strong_(get_peft_model(backbone(tiny, model_class), tiny.config(task_type=task), adapter_name=name))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "moka_" not in n}
    assert trainable
    assert all(f".{head}.modules_to_save.{name}." in n for n in trainable)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch.kwargs(), **labels(task, batch)).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert {n for n in before if not torch.equal(before[n], after[n])} >= trainable
    assert all(torch.equal(before[n], p) for n, p in after.items() if not p.requires_grad)

    folder = tmp_path if name == "default" else tmp_path / name
    model.save_pretrained(tmp_path)
    assert head in PeftConfig.from_pretrained(folder).modules_to_save
    assert any(f".{head}." in key for key in load_file(folder / "adapter_model.safetensors"))
    # The head of the fresh backbone is another one; the saved one must win.
    fresh = backbone(tiny, model_class)
    with torch.no_grad():
        getattr(fresh, head).weight.add_(1.0)
    loaded = PeftModel.from_pretrained(fresh, folder, adapter_name="again")
    assert torch.equal(result(loaded, batch), result(model, batch))
    assert result(loaded, batch).shape[0] == batch.input_ids.shape[0]


def test_two_heads_switch_with_their_adapters(tiny, batch, tmp_path):
    model = tiny.strong_(
        get_peft_model(backbone(tiny, LlamaForSequenceClassification), tiny.config(task_type="SEQ_CLS"))
    )
    model.save_pretrained(tmp_path)
    first = result(model, batch)
    model.add_adapter("b", tiny.config(task_type="SEQ_CLS"))
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["b"].weight.add_(1.0)
    assert torch.equal(result(model, batch), first)
    model.set_adapter("b")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and "score" in n} == {"b"}
    assert (result(model, batch) - first).abs().max() > 0.1
    model.load_adapter(tmp_path, "c")
    model.set_adapter("c")
    assert torch.equal(result(model, batch), first)
    with model.disable_adapter():
        bare = backbone(tiny, LlamaForSequenceClassification)
        assert torch.equal(result(model, batch), result(bare, batch_text(batch)))


def batch_text(batch):
    """A view of the batch that a bare backbone takes."""

    class Bare:
        def kwargs(self, *names):
            return batch.text

    return Bare()


def test_sequence_classification_routes_as_the_decoder_does(tiny, batch):
    model = tiny.strong_(
        get_peft_model(backbone(tiny, Qwen2ForSequenceClassification), tiny.config(task_type="SEQ_CLS"))
    )
    routed = result(model, batch)
    text = model(batch.input_ids, attention_mask=batch.attention_mask, mm_token_type_ids=batch.input_ids * 0).logits
    has_media = batch.mm_token_type_ids.any(1)
    assert (routed - text)[has_media].abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(routed[~has_media], text[~has_media])
    # Labels of a row do not show where its question ends; text without media needs no question.
    text_only = batch.row(3)
    assert torch.isfinite(model.train()(text_only.input_ids, labels=torch.tensor([1])).loss)
    with pytest.raises(moka.MokaError, match="interaction_ids"):
        model(batch.input_ids, labels=torch.arange(4) % 3)


def test_all_linear_leaves_the_classification_head(tiny):
    settings = tiny.config(task_type="SEQ_CLS", target_modules="all-linear")
    model = get_peft_model(backbone(tiny, LlamaForSequenceClassification), settings)
    assert sum(isinstance(m, MokaLinear) for m in model.modules()) == 14
    assert not any(isinstance(m, MokaLinear) for m in model.base_model.model.score.modules())


def test_merge_and_unload_keeps_the_trained_head(tiny, batch):
    settings = tiny.config(task_type="SEQ_CLS", modalities={"text": [0]}, modality_token_ids=None)
    model = tiny.strong_(get_peft_model(backbone(tiny, LlamaForSequenceClassification), settings))
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(0.5)
    text = batch_text(batch)
    expected = result(model, text)
    merged = model.merge_and_unload()
    assert isinstance(merged.score, torch.nn.Linear)
    tiny.same(result(merged, text), expected)


def test_auto_class_loads_backbone_and_adapter(tiny, batch, tmp_path):
    base = backbone(tiny, LlamaForSequenceClassification)
    base.save_pretrained(tmp_path / "base")
    settings = tiny.config(task_type="SEQ_CLS", base_model_name_or_path=str(tmp_path / "base"))
    model = tiny.strong_(get_peft_model(base, settings))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(result(loaded, batch), result(model, batch))


@pytest.mark.parametrize("model_class", [LlamaModel, Qwen2Model])
def test_feature_extraction(tiny, batch, tmp_path, model_class):
    settings = tiny.config(task_type="FEATURE_EXTRACTION")
    model = tiny.strong_(get_peft_model(backbone(tiny, model_class), settings))
    assert sum(isinstance(m, MokaLinear) for m in model.modules()) == 14
    features = result(model, batch)
    assert features.shape == (*batch.input_ids.shape, 64)
    assert (features - result(backbone(tiny, model_class), batch_text(batch))).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    assert torch.equal(result(PeftModel.from_pretrained(backbone(tiny, model_class), tmp_path), batch), features)
    # `inputs_embeds` instead of ids, with the types given.
    embeds = model.get_input_embeddings()(batch.input_ids)
    same = model(inputs_embeds=embeds, **batch.ids).last_hidden_state
    torch.testing.assert_close(same, features)


# --- tied embeddings -------------------------------------------------------------------------------------------------


def tied(tiny):
    model = backbone(tiny, LlamaForCausalLM, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


def test_tied_embeddings_that_no_adapter_touches_stay_tied(tiny, batch, tmp_path):
    model = tiny.adapted(backbone=tied(tiny))
    expected = result(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(result(PeftModel.from_pretrained(tied(tiny), tmp_path), batch), expected)
    model.merge_adapter()
    tiny.same(result(model, batch), expected)
    with pytest.warns(UserWarning, match="merge_and_unload keeps"):
        merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings


def test_merging_into_a_tied_head_leaves_the_embedding_only(tiny, batch, tmp_path):
    """Head and embedding are one tensor: the head gets its own while it is merged, and the shared one back after."""
    model = tiny.adapted(backbone=tied(tiny), target_modules=["lm_head"])
    expected = result(model, batch)
    embedding = model.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    tiny.same(result(model, batch), expected)
    model.unmerge_adapter()
    assert model.base_model.model.lm_head.base_layer.weight is model.get_input_embeddings().weight
    assert torch.equal(result(model, batch), expected)
    text = tiny.rows(["t t q q"])
    expected = result(model, text)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    for bare in (merged, again):
        tiny.same(bare(text.input_ids).logits, expected)


def test_unload_after_merging_a_tied_head_ties_again(tiny):
    model = tiny.adapted(backbone=tied(tiny), target_modules=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    model.unmerge_adapter()
    bare = model.unload()
    assert bare.lm_head.weight is bare.get_input_embeddings().weight
