"""Bad input to an adapted model gets an error that names it, what was given, and the remedy, before any compute.

Wrong fields of the configuration: test_config. A question in another chunk of the prompt: test_generation. Damaged
adapter folders: test_broken_files.
"""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import moka

ROUTED = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")


@pytest.fixture
def no_compute(model):
    """The model, and an error of another type as soon as its first layer runs."""

    def ran(*_):
        raise AssertionError("a layer ran before the check")

    model.get_input_embeddings().register_forward_hook(ran)
    return model


TYPES, GROUPS, QUESTION = "mm_token_type_ids", "interaction_ids", "question_mask"
WRONG_IDS = [
    (TYPES, lambda t: t.masked_fill(t == 1, 7), r"\[7\].*\{'text': \[0\], 'visual': \[1, 2\]"),
    (TYPES, lambda t: t - 1, r"\[-1\]"),
    (TYPES, lambda t: t[:, 1:], r"\[4, 9\].*\[4, 10\]"),
    (TYPES, lambda t: t[:2], r"\[2, 10\].*\[4, 10\]"),
    (TYPES, lambda t: t[0], r"\[10\].*\[4, 10\]"),
    (TYPES, lambda t: t.float(), r"integer.*float32"),
    (TYPES, lambda t: t > 0, r"integer.*torch.bool"),
    (TYPES, lambda t: t.tolist(), r"integer.*list"),
    (GROUPS, lambda t: t[:, :-1], r"\[4, 9\].*\[4, 10\]"),
    (GROUPS, lambda t: t.bool(), r"integer.*torch.bool"),
    (QUESTION, lambda t: torch.ones(4, 9).bool(), r"\[4, 9\].*\[4, 10\]"),
    (QUESTION, lambda t: torch.ones(4, 10), r"bool.*float32"),
]


@pytest.mark.parametrize("verb", ["forward", "generate", "routing", "routing generate"])
@pytest.mark.parametrize(("name", "edit", "message"), WRONG_IDS)
def test_ids(no_compute, batch, name, edit, message, verb):
    given = batch.kwargs("input_ids", "attention_mask")
    ids = batch.kwargs(TYPES) if name == QUESTION else batch.kwargs(TYPES, GROUPS)
    ids[name] = edit(ids.get(name))

    def run():
        if verb == "forward":
            return no_compute(**given, **ids)
        if verb == "generate":
            return no_compute.generate(**given, **ids, max_new_tokens=1)
        with moka.routing(no_compute, **ids):
            return no_compute.generate(**given) if verb == "routing generate" else no_compute(**given)

    with pytest.raises(moka.MokaError, match=f"{name}.*{message}"):
        run()


@pytest.mark.parametrize("markers", [None, {"user": [99], "assistant": [98]}], ids=["no markers", "markers"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda b: {"attention_mask": b.attention_mask[:, 2:]}, r"attention_mask.*\[4, 8\].*\[4, 10\]"),
        (lambda b: {"labels": b.input_ids[:, 1:]}, r"labels.*\[4, 9\].*\[4, 10\].*interaction_ids"),
        (lambda b: {"labels": b.input_ids[:2]}, r"labels.*\[2, 10\].*\[4, 10\].*interaction_ids"),
    ],
    ids=["mask", "labels", "labels of fewer rows"],
)
def test_another_shape_than_the_tokens(tiny, batch, given, message, markers):
    model = tiny.adapted(turn_markers=markers)
    with pytest.raises(moka.MokaError, match=message):
        model(input_ids=batch.input_ids, **given(batch))


def test_a_question_without_types(no_compute, batch):
    with pytest.raises(moka.MokaError, match=r"interaction_ids.*mm_token_type_ids \[batch, seq\]"):
        no_compute(inputs_embeds=torch.randn(4, 10, 64), interaction_ids=batch.interaction_ids)


def test_ids_that_end_before_the_cached_tokens_ids(model, tiny):
    row = tiny.rows(["i i q q t t"])
    cache = model(**row.kwargs(*ROUTED), use_cache=True).past_key_values
    with pytest.raises(moka.MokaError, match=r"mm_token_type_ids.*\[1, 4\].*\[1, 2\].*6 cached.*\[1, 8\]"):
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, mm_token_type_ids=torch.zeros(1, 4).long())


def test_routing_of_a_model_without_an_adapter(tiny):
    with pytest.raises(moka.MokaError, match=r"moka.routing.*LlamaForCausalLM"), moka.routing(tiny.backbone()):
        pass


def test_a_processor_without_a_chat_template(tiny_tokenizer):
    fast = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(moka.MokaError, match=rf"{type(fast).__name__}.*chat_template.*turn_markers"):
        moka.MokaConfig.from_processor(fast)
    config = moka.MokaConfig.from_processor(fast, turn_markers={"user": [1], "assistant": [2]})
    assert config.turn_markers == {"user": [1], "assistant": [2]}


@pytest.mark.parametrize("training", [False, True])
def test_markers_that_match_nothing_are_reported_once_with_the_first_ids(tiny, training):
    """The labels, or the text of the prompt, say the question then."""
    batch = tiny.rows(["t i i q q t"])
    ids = batch.kwargs("input_ids", "attention_mask")
    ids["labels"] = batch.input_ids.where(torch.arange(6) == 5, -100)
    model, plain = (tiny.adapted(turn_markers=m).train(training) for m in ({"user": [99, 98]}, None))
    begin = ", ".join(map(str, batch.input_ids[0].tolist()))
    with pytest.warns(UserWarning, match=rf"turn_markers.*\[99, 98\].*{begin}") as caught:
        logits = [model(**ids).logits for _ in range(3)]
    assert sum("turn_markers" in str(warning.message) for warning in caught) == 1
    assert all(torch.equal(one, plain(**ids).logits) for one in logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj", "vproj"]}, r"'q_prj', 'vproj'.*LlamaForCausalLM.*q_proj.*v_proj"),
        ({"target_modules": "nothing.*"}, r"nothing.*q_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform.*\[7\].*2 blocks"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"exclude_modules.*q_proj"),
        ({"target_modules": ["embed_tokens"]}, r"'model.embed_tokens'.*Embedding.*nn.Linear, Conv1D"),
    ],
)
def test_target_modules(tiny, settings, message):
    backbone = tiny.backbone()
    before = sorted(vars(backbone))
    with pytest.raises(moka.MokaError, match=f"target_modules.*{message}"):
        get_peft_model(backbone, tiny.config(**settings))
    assert sorted(vars(backbone)) == before
    assert not backbone._forward_pre_hooks


def test_default_layers_that_a_model_lacks(tiny):
    with pytest.raises(moka.MokaError, match=r"target_modules.*Sequential.*\['0'\]"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), tiny.config(task_type=None))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, folder, config: PeftModel.from_pretrained(model, folder),
        lambda model, folder, config: PeftModel.from_pretrained(model, folder, adapter_name="second"),
        lambda model, folder, config: get_peft_model(model, config),
        lambda model, folder, config: get_peft_model(model.base_model, config),
    ],
    ids=["from_pretrained", "under another name", "get_peft_model", "over the tuner"],
)
def test_a_model_that_is_wrapped_twice(model, tiny, batch, tmp_path, wrap):
    model.save_pretrained(tmp_path)
    before = model(**batch.kwargs(*ROUTED)).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of a second adapter
        with pytest.raises(moka.MokaError, match=r"model.*PeftModel.*load_adapter.*get_base_model"):
            wrap(model, tmp_path, tiny.config(task_type=None))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**batch.kwargs(*ROUTED)).logits, before)


def test_a_sum_of_adapters(model):
    with pytest.raises(moka.MokaError, match=r"add_weighted_adapter.*set_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]


def test_loading_into_a_merged_adapter(model, batch, tmp_path):
    """Unmerging would take the new text path out of a weight that has the old one."""
    model.save_pretrained(tmp_path)
    base = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    model.merge_adapter()
    before = model(**batch.kwargs(*ROUTED)).logits
    with pytest.raises(moka.MokaError, match=r"'default'.*unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(**batch.kwargs(*ROUTED)).logits, before)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all((after[name] - value).abs().max() < 1e-5 for name, value in base.items())


def test_the_question_given_twice(model, batch):
    with pytest.raises(moka.MokaError, match=r"interaction_ids.*question_mask"):
        model(**batch.kwargs(*ROUTED), question_mask=batch.mm_token_type_ids == 0)


def test_a_configuration_completed_for_another_model(tiny):
    """Its placeholder ids are those of the first; the media of the second would be text."""
    config = tiny.config(modality_token_ids=None)
    for image in (tiny.IMAGE, tiny.IMAGE):
        backbone = tiny.backbone()
        backbone.config.image_token_id = image
        get_peft_model(backbone, config)
    backbone = tiny.backbone()
    backbone.config.image_token_id = 99
    with pytest.raises(moka.MokaError, match=r"modality_token_ids.*126.*99"):
        get_peft_model(backbone, config)
    with pytest.warns(UserWarning, match=r"modality_token_ids: 'visual' has \[126\].*\[99\]"):
        get_peft_model(backbone, tiny.config(modality_token_ids={"visual": [tiny.IMAGE]}))
