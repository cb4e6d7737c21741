"""Bad input to an adapted model gets an error that names it, what was given, and the remedy, before any compute.

Wrong fields of the configuration: test_config. Questions that lie in another chunk: test_generation.
"""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize("verb", ["forward", "generate", "routing", "routing generate"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mm_token_type_ids": lambda t: t.masked_fill(t == 1, 7)},
            r"mm_token_type_ids holds \[7\], .*known: \{'text': \[0\], 'visual'.*Add the id to MokaConfig.modalities",
        ),
        ({"mm_token_type_ids": lambda t: t - 1}, r"mm_token_type_ids holds \[-1\]"),
        ({"mm_token_type_ids": lambda t: t[:, 1:]}, r"mm_token_type_ids is \[4, 9\], but the tokens are \[4, 10\]"),
        ({"mm_token_type_ids": lambda t: t[:2]}, r"mm_token_type_ids is \[2, 10\], but the tokens are \[4, 10\]"),
        ({"mm_token_type_ids": lambda t: t[0]}, r"mm_token_type_ids is \[10\], but the tokens are \[4, 10\]"),
        ({"mm_token_type_ids": lambda t: t.float()}, r"mm_token_type_ids: needs a \[batch, seq\] integer .*float32"),
        ({"mm_token_type_ids": lambda t: t > 0}, r"mm_token_type_ids: needs .* integer tensor, got torch.bool"),
        ({"mm_token_type_ids": lambda t: t.tolist()}, r"mm_token_type_ids: needs .* integer tensor, got list"),
        ({"interaction_ids": lambda t: t[:, :-1]}, r"interaction_ids is \[4, 9\], but the tokens are \[4, 10\]"),
        ({"interaction_ids": lambda t: t.bool()}, r"interaction_ids: needs .* integer tensor, got torch.bool"),
        (
            {"interaction_ids": lambda t: None, "question_mask": lambda t: torch.ones(4, 9).bool()},
            r"question_mask is \[4, 9\], mm_token_type_ids \[4, 10\]; they must agree",
        ),
        (
            {"interaction_ids": lambda t: None, "question_mask": lambda t: torch.ones(4, 10)},
            r"question_mask: needs a \[batch, seq\] bool tensor, got torch.float32",
        ),
    ],
)
def test_ids(no_compute, batch, change, message, verb):
    given = {"question_mask": None, **batch.kwargs(*ROUTED)}
    given |= {name: edit(given[name]) for name, edit in change.items()}
    ids = {name: given.pop(name) for name in ("mm_token_type_ids", "interaction_ids", "question_mask")}

    def run():
        if verb == "forward":
            return no_compute(**given, **ids)
        if verb == "generate":
            return no_compute.generate(**given, **ids, max_new_tokens=1)
        with moka.routing(no_compute, **ids):
            return no_compute.generate(**given) if verb == "routing generate" else no_compute(**given)

    with pytest.raises(moka.MokaError, match=message):
        run()


def test_attention_mask_of_another_length(no_compute, batch):
    with pytest.raises(moka.MokaError, match=r"attention_mask is \[4, 8\], but the tokens are \[4, 10\]"):
        no_compute(input_ids=batch.input_ids, attention_mask=batch.attention_mask[:, 2:])


def test_labels_of_another_length_cannot_tell_the_question(no_compute, batch):
    with pytest.raises(moka.MokaError, match=r"labels is \[4, 9\], but the tokens are \[4, 10\].*interaction_ids"):
        no_compute(input_ids=batch.input_ids, labels=batch.input_ids[:, 1:])


def test_a_question_without_types(no_compute, batch):
    embeds = torch.randn(4, 10, 64)
    with pytest.raises(moka.MokaError, match=r"came without mm_token_type_ids.*Pass mm_token_type_ids \[batch, seq\]"):
        no_compute(inputs_embeds=embeds, interaction_ids=batch.interaction_ids)


def test_ids_that_end_before_the_cached_tokens_ids(model, tiny):
    row = tiny.rows(["i i q q t t"])
    cache = model(**row.kwargs(*ROUTED), use_cache=True).past_key_values
    with pytest.raises(
        moka.MokaError, match=r"is \[1, 4\], but the tokens are \[1, 2\] or, with the 6 cached.*\[1, 8\]"
    ):
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, mm_token_type_ids=torch.zeros(1, 4).long())


def test_routing_of_a_model_without_an_adapter(tiny):
    with (
        pytest.raises(moka.MokaError, match="LlamaForCausalLM holds no MokA adapter; attach one with get_peft_model"),
        moka.routing(tiny.backbone()),
    ):
        pass


def test_layer_outside_the_language_model(tiny):
    """An adapted head gets one token a row in generate: said, not guessed."""
    model = tiny.adapted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(moka.MokaError, match=r"got \[1, 1\] tokens, .* for \[1, 4\].*MokaConfig.exclude_modules"):
        model.generate(**tiny.rows(["i i q q"]).kwargs(*ROUTED), max_new_tokens=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_prj", "vproj"]},
            r"target_modules: \['q_prj', 'vproj'\] matches no layer of LlamaForCausalLM. Linear .*q_proj.*v_proj",
        ),
        ({"target_modules": "nothing.*"}, r"target_modules: \['nothing.*'\] matches no layer.*q_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"matches no layer.*layers_to_transform.*\[7\]"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"matches no layer.*exclude_modules.*q_proj"),
        (
            {"target_modules": ["embed_tokens"]},
            "target_modules: 'model.embed_tokens' is a Embedding; MokA adapts nn.Linear, Conv1D and quantised",
        ),
    ],
)
def test_target_modules(tiny, settings, message):
    backbone = tiny.backbone()
    with pytest.raises(moka.MokaError, match=message):
        get_peft_model(backbone, tiny.config(**settings))
    assert not {"forward", "generate", "moka_router"} & set(vars(backbone))


def test_default_layers_that_a_model_lacks(tiny):
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(moka.MokaError, match=r"target_modules: Sequential has none of the default layers .*\['0'\]"):
        get_peft_model(net, tiny.config(task_type=None))


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    return tmp_path


def damage(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors, next(key for key in sorted(tensors) if "moka_A" in key))
    save_file(tensors, path)


DAMAGES = {
    "missing": (lambda t, key: t.pop(key), r"lacks 1 of 29 tensors of this model \(.*moka_A.*target_modules"),
    "no module": (lambda t, key: t.pop("base_model.model.lm_head.weight"), r"lacks the modules \['lm_head'\]"),
    "extra": (
        lambda t, key: t.update({key.replace("layers.0", "layers.5"): t[key].clone()}),
        r"holds 1 tensors that this model has no place for \(.*layers.5",
    ),
    "empty": (lambda t, key: t.update({key: torch.empty(0)}), r"holds 1 empty tensors \(.*ZeRO-3, FSDP"),
    "shape": (
        lambda t, key: t.update({key: torch.zeros(3, 8, 96)}),
        r"moka_A.* is \[3, 8, 96\] in the adapter and \[3, 4, 96\] in this model: another backbone, rank",
    ),
    "nan": (lambda t, key: t[key].view(-1)[3].fill_(float("nan")), "holds values that are not finite.*moka_A"),
    "inf": (lambda t, key: t[key].view(-1)[0].fill_(float("inf")), "holds values that are not finite"),
}


@pytest.mark.parametrize("verb", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_adapter_folder(tiny, folder, kind, verb):
    edit, message = DAMAGES[kind]
    damage(folder, edit)
    adapted = tiny.adapted()
    load = {
        "from_pretrained": lambda: PeftModel.from_pretrained(tiny.backbone(), folder),
        "load_adapter": lambda: adapted.load_adapter(str(folder), "second"),
    }
    with pytest.raises(moka.MokaError, match=message):
        load[verb]()


def test_values_loaded_by_transformers_itself_are_checked_before_the_first_inference(tiny, folder):
    """Its ``model.load_adapter`` asks nobody; what is missing or extra it prints in its own load report."""
    damage(folder, DAMAGES["nan"][0])
    model, row = tiny.backbone(), tiny.rows(["i i q q"])
    model.load_adapter(str(folder), adapter_name="mine")
    with pytest.raises(moka.MokaError, match=r"Adapter 'mine' holds values that are not finite.*moka_A"):
        model(**row.kwargs(*ROUTED))


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def blank(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"")


def remove(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "cannot be read.*truncated or damaged. Copy it again"),
        (blank, "cannot be read.*truncated or damaged. Copy it again"),
        (remove, "has no adapter_model.safetensors; copy the whole adapter folder"),
    ],
)
def test_damaged_weights_file_leaves_the_backbone_alone(tiny, folder, harm, message):
    harm(folder)
    backbone = tiny.backbone()
    with pytest.raises(moka.MokaError, match=message):
        PeftModel.from_pretrained(backbone, folder)
    assert "moka" not in repr(backbone)
    assert not hasattr(backbone, "peft_config")


def test_adapter_of_another_rank_named_in_the_config(tiny, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    with pytest.raises(moka.MokaError, match=r"\[3, 4, .*\] in the adapter and \[3, 2, .*rank or number of modalities"):
        PeftModel.from_pretrained(tiny.backbone(), folder)


def test_tensors_in_memory_are_checked_too(model, tiny):
    """``set_peft_model_state_dict`` is what loads from the Hub and from trainers."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    key = next(iter(state))
    with pytest.raises(moka.MokaError, match=r"holds values that are not finite"):
        set_peft_model_state_dict(model, {**state, key: state[key] * float("nan")})
