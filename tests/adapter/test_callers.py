"""How other code reaches an adapted model: own losses, replaced forwards, hooks of frameworks."""

import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model

from moka.testing import mllms

USER, ASSISTANT, IMAGE = 100, 101, mllms.IMAGE
MARKERS = {"user": [USER], "assistant": [ASSISTANT]}


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**mllms.TEXT)), {}


def llava():
    return mllms.backbone(mllms.CASES["llava"]), mllms.pictures(2, 3, 8, 8)


def qwen2_5_vl():
    return mllms.backbone(mllms.CASES["qwen2_5_vl"]), mllms.qwen_pictures(2)


MODELS = {"llama": llama, "llava": llava, "qwen2_5_vl": qwen2_5_vl}


def ids_of(layouts):
    """u and s: markers of a user's and an assistant's turn; i image; a answer; other letters are text."""
    letters = [row.split() for row in layouts]
    fixed = {"u": USER, "s": ASSISTANT, "i": IMAGE}
    ids = torch.tensor([[fixed.get(letter, int(torch.randint(1, 90, ()))) for letter in row] for row in letters])
    answer = torch.tensor([[letter == "a" for letter in row] for row in letters])
    question = torch.tensor([[letter in "iq" for letter in row] for row in letters])
    return ids, torch.where(answer, ids, -100), question.long()


def build(kind, tiny, **settings):
    """An adapted model in training without dropout; its inputs with ``interaction_ids``; the labels."""
    torch.manual_seed(0)
    base, media = MODELS[kind]()
    settings = {"modality_token_ids": {"visual": [IMAGE]}, **settings}
    model = tiny.strong_(get_peft_model(base.eval(), tiny.config(**settings))).train()
    ids, labels, groups = ids_of(["t u i i i i q q q s a a a", "u q i i i i q q s a a a t"])
    types_ = (ids == IMAGE).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types_, **media}
    return model, inputs | {"interaction_ids": groups, "use_cache": False}, labels


@pytest.fixture(params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture(params=["ids", "markers"])
def setup(request, kind, tiny):
    """The question as ids, and as the configuration's turn markers: own losses give the decoder no labels."""
    if request.param == "ids":
        return build(kind, tiny)
    model, inputs, labels = build(kind, tiny, turn_markers=MARKERS)
    return model, {name: value for name, value in inputs.items() if name != "interaction_ids"}, labels


def loss_of(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def step(model, tiny, labels, run):
    """Logits of ``run`` and the gradients of the loss on them."""
    model.zero_grad()
    logits = run()
    loss_of(logits, labels).backward()
    return logits.detach(), tiny.gradients(model)


def assert_same_step(ours, expected):
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(ours[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    visual = [gradient[1] for name, gradient in ours[1].items() if "layers.0.self_attn.q_proj.moka_A" in name]
    assert len(visual) == 1
    assert visual[0].abs().max() > 1e-6


# The decoder without the outer forward


@pytest.mark.parametrize("body", ["base_model", "model"])
def test_an_own_loss_on_the_hidden_states_trains_as_the_outer_forward(setup, tiny, body):
    model, inputs, labels = setup
    base = model.get_base_model()
    expected = step(model, tiny, labels, lambda: model(**inputs).logits)
    ours = step(model, tiny, labels, lambda: base.lm_head(getattr(base, body)(**inputs)[0]))
    assert_same_step(ours, expected)


def test_the_language_model_called_on_own_embeddings_trains_as_the_outer_forward(tiny):
    model, inputs, labels = build("llava", tiny, turn_markers=MARKERS)
    del inputs["interaction_ids"]
    base, ids = model.get_base_model(), inputs["input_ids"]
    expected = step(model, tiny, labels, lambda: model(**inputs).logits)

    def run():
        embeds = base.get_input_embeddings()(ids)
        features = torch.cat(list(base.model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features)
        return base.lm_head(base.model.language_model(inputs_embeds=embeds, use_cache=False)[0])

    assert_same_step(step(model, tiny, labels, run), expected)


def fused_forward(self, labels=None, **kwargs):
    """As fused losses do: the decoder, and a head that the model's own forward knows nothing of."""
    logits = F.linear(self.model(**kwargs)[0], self.lm_head.weight)
    return SimpleNamespace(logits=logits)


def replace_by_method(base):
    base.forward = types.MethodType(fused_forward, base)


def replace_by_accelerate(base):
    add_hook_to_module(base, ModelHook())
    add_hook_to_module(base.model, ModelHook())


@pytest.mark.parametrize("replace", [replace_by_method, replace_by_accelerate])
def test_a_forward_replaced_after_attaching_trains_as_before(setup, tiny, replace):
    model, inputs, labels = setup
    expected = step(model, tiny, labels, lambda: model(**inputs).logits)
    replace(model.get_base_model())
    assert "forward" in vars(model.get_base_model())
    assert_same_step(step(model, tiny, labels, lambda: model(**inputs).logits), expected)


def test_the_fused_head_of_trl_trains_as_the_models_own_loss(setup, tiny):
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("a trl without add_fused_lm_head")
    model, inputs, labels = setup
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    expected = tiny.gradients(model)
    model.zero_grad()
    utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs",))
    fused = model(**inputs, labels=labels, fused_lm_head=True).loss
    fused.backward()
    assert fused.item() == pytest.approx(loss.item(), abs=1e-5)
    for name, gradient in tiny.gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def embedding_hook(base):
    """A pre-hook that embeds ids and media, and leaves the model neither."""

    def embed(module, args, kwargs):
        ids, kwargs = kwargs["input_ids"], dict(kwargs)
        embeds = base.get_input_embeddings()(ids)
        if "pixel_values" in kwargs:
            media = {name: kwargs.pop(name) for name in ("pixel_values", "image_grid_thw") if name in kwargs}
            features = base.model.get_image_features(**media).pooler_output
            features = torch.cat(list(features)).reshape(-1, embeds.shape[-1])
            embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features)
            if "image_grid_thw" in media:
                types_ = (ids == IMAGE).int()
                kwargs["position_ids"] = base.model.get_rope_index(ids, types_, media["image_grid_thw"])[0]
        for name in ("input_ids", "mm_token_type_ids", "interaction_ids"):
            kwargs.pop(name, None)
        return args, {**kwargs, "inputs_embeds": embeds}

    return embed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_framework_that_embeds_in_a_hook_before_the_model(kind, tiny, checkpointing):
    model, inputs, labels = build(kind, tiny)
    inputs.pop("interaction_ids")
    expected = step(model, tiny, labels, lambda: model(**inputs, labels=labels).logits)
    if checkpointing:
        model.gradient_checkpointing_enable()
    hook = embedding_hook(model.get_base_model())
    model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    assert_same_step(step(model, tiny, labels, lambda: model(**inputs, labels=labels).logits), expected)


def test_ids_that_were_embedded_for_another_forward_route_nothing(tiny, batch):
    """The embedding of one input, then a forward of another, must not decide about embeddings of the same shape."""
    model = tiny.adapted()
    base = model.get_base_model()
    text = tiny.rows(["q q q q t t t t t t"] * 4)
    with torch.no_grad():
        base.get_input_embeddings()(batch.input_ids)
        model(**text.kwargs())
        embeds = torch.randn(*batch.input_ids.shape, base.config.hidden_size)
        with pytest.warns(UserWarning, match="mm_token_type_ids"):
            found = model(inputs_embeds=embeds).logits
        types_ = torch.zeros_like(batch.input_ids)
        torch.testing.assert_close(found, model(inputs_embeds=embeds, mm_token_type_ids=types_).logits)
