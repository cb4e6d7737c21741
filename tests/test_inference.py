"""``moka.load``: a run as it was trained, or a clear refusal."""

import itertools
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import moka
from moka.demo.digit_tasks import EmbeddedTask
from moka.errors import MokaError
from moka.inference import share_equal_weights
from moka.modeling.build import build_model
from moka.training import config_from_dict, run_training

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def lora_run(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    changes = {"adapter__method": "lora", "stages": [2], "training__save_strategy": "no", "data__validation": None}
    return run_training(config_from_dict(tiny_config(folder, **changes)))


@pytest.fixture(params=["moka", "lora"])
def adapter(request, trained_run, tmp_path):
    """A copy of a trained adapter folder, to spoil."""
    run = trained_run if request.param == "moka" else request.getfixturevalue("lora_run")
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    return folder


def logits(model, processor):
    sample = EmbeddedTask("audio-visual-text", "test", size=2)[1]
    batch = processor(sample["messages"][:1])
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


def refused(folder, **how):
    with pytest.raises(MokaError) as caught:
        moka.load(folder, **how)
    return str(caught.value)


def test_plain_peft_loads_what_moka_loads(adapter):
    loaded = moka.load(adapter)
    plain = PeftModel.from_pretrained(moka.load_base(adapter), adapter)
    assert torch.equal(logits(plain, loaded.processor), logits(loaded.model, loaded.processor))
    bare = moka.load_base(adapter)
    assert not torch.allclose(logits(bare, loaded.processor), logits(loaded.model, loaded.processor), atol=1e-3)


def test_loaded_tensors_are_the_saved_ones(adapter):
    saved = load_file(adapter / WEIGHTS)
    state = moka.load(adapter).model.state_dict()
    for key, tensor in saved.items():
        head, _, tail = key.rpartition(".")
        names = [f"{key}.default", f"{head}.default.{tail}"]
        names += [key.replace(f"{part}.", f"{part}.modules_to_save.default.") for part in ("visual", "audio")]
        (name,) = [name for name in names if name in state]
        assert torch.equal(state[name], tensor), key


@pytest.mark.parametrize("change", [(".weight", ""), ("language_model.model.layers.", "language_model.layers.")])
def test_files_of_format_1_and_of_other_paths_load(trained_run, tmp_path, change):
    shutil.copytree(trained_run / "adapter", tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    renamed = {key.replace(*change) if ".moka_" in key else key: tensor for key, tensor in saved.items()}
    assert renamed.keys() != saved.keys()
    save_file(renamed, tmp_path / "adapter" / WEIGHTS)
    now, before = moka.load(tmp_path / "adapter"), moka.load(trained_run)
    assert torch.equal(logits(now.model, now.processor), logits(before.model, before.processor))


def test_every_missing_tensor_is_noticed(adapter):
    saved = load_file(adapter / WEIGHTS)
    groups = ("projectors.visual", "encoders.audio", "moka_A", "moka_B", "lora_A", "lora_B")
    tried = 0
    for group in groups:
        gone = next((key for key in saved if group in key), None)
        if gone is None:
            continue
        save_file({key: t for key, t in saved.items() if key != gone}, adapter / WEIGHTS)
        message = refused(adapter)
        assert "lack" in message, message
        tried += 1
    assert tried == 4


def test_full_projector_gone_is_noticed(adapter):
    saved = load_file(adapter / WEIGHTS)
    save_file({key: t for key, t in saved.items() if "projectors.visual" not in key}, adapter / WEIGHTS)
    assert "projectors.visual" in refused(adapter)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (WEIGHTS, 300, ["truncated"]),
        (WEIGHTS, b"", [WEIGHTS]),
        (WEIGHTS, None, [WEIGHTS]),
        ("moka_model.json", None, ["moka_model.json"]),
        ("moka_model.json", b'{"format', ["moka_model.json", "damaged"]),
        ("moka_model.json", b"{}", ["moka_model.json", "lacks"]),
        ("adapter_config.json", b'{"peft', ["adapter_config.json", "damaged"]),
        ("moka_processor.json", None, ["moka_processor.json"]),
    ],
)
def test_damaged_files_are_named(adapter, name, content, words):
    path = adapter / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    message = refused(adapter)
    for word in words:
        assert word in message, message


def test_weights_in_a_pickle_only_are_refused(adapter):
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    assert "moka.load reads safetensors only" in refused(adapter)


def test_values_that_are_not_finite_are_refused(adapter):
    saved = load_file(adapter / WEIGHTS)
    next(iter(saved.values())).view(-1)[0] = float("nan")
    save_file(saved, adapter / WEIGHTS)
    assert "not finite" in refused(adapter)


def test_backbone_of_other_shapes_is_refused(adapter, backbones, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(backbones["llama"])
    config.hidden_size, config.intermediate_size, config.head_dim = 32, 48, 8
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(backbones["llama"]).save_pretrained(tmp_path / "small")
    message = refused(adapter, backbone=str(tmp_path / "small"))
    assert "Use the backbone it was trained on" in message
    assert "Use the backbone" in refused(adapter, backbone=str(backbones["qwen2"]))


def test_backbone_of_same_shapes_and_other_weights_is_refused(adapter, backbones, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(backbones["llama"], other)
    weights = load_file(other / "model.safetensors")
    save_file({key: t + 0.01 for key, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert "fingerprint" in refused(adapter, backbone=str(other))


def test_moved_backbone_is_found_where_one_says(adapter, backbones, tmp_path):
    description = json.loads((adapter / "moka_model.json").read_text())
    description["backbone"] = str(tmp_path / "elsewhere")
    (adapter / "moka_model.json").write_text(json.dumps(description))
    assert "elsewhere" in refused(adapter)
    answers = [moka.load(adapter, backbone=str(folder)).generate("Which?") for folder in (backbones["llama"],) * 2]
    assert answers[0] == answers[1]


def places(value, at=()):
    """Paths to every value in a JSON value; of a list the first item only."""
    yield at
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*at, key))


def changed(value, at, new):
    if not at:
        return new
    copied = value.copy()
    copied[at[0]] = changed(value[at[0]], at[1:], new)
    return copied


@pytest.mark.parametrize("name", ["moka_model.json", "moka_processor.json", "adapter_config.json"])
def test_wrong_types_in_json_files_are_refused_or_harmless(trained_run, tmp_path, monkeypatch, name):
    """Every value is replaced by one of another type: what comes is a model, or an error that names the file or field."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(trained_run / "adapter", tmp_path / "adapter")
    good = json.loads((tmp_path / "adapter" / name).read_text())
    wrong = itertools.cycle([None, "x", [], 1.5, {"x": 1}, -1, [None], True, 10**30, {}, float("nan")])
    refusals, unnamed = 0, []
    for at in [*places(good), *places(good)]:  # two wrong values in each place
        (tmp_path / "adapter" / name).write_text(json.dumps(changed(good, at, next(wrong))))
        try:
            moka.load(tmp_path / "adapter").generate("Which?", max_new_tokens=1)
        except MokaError as error:
            refusals += 1
            if name not in str(error) and not any(str(key) in str(error) for key in at):
                unnamed.append((at, str(error)))
    assert not unnamed
    assert refusals >= len(list(places(good)))


def test_adapter_of_a_newer_format_is_refused(adapter):
    description = json.loads((adapter / "moka_model.json").read_text())
    (adapter / "moka_model.json").write_text(json.dumps({**description, "format_version": 99}))
    assert "newer moka" in refused(adapter)


def test_training_and_loading_build_the_same_model(trained_run, tiny_config):
    """The connector of stage 1 and the adapter's own copy start from one and the same base."""
    trained = build_model(config_from_dict(tiny_config("unused")).model)[0]
    assert moka.load_base(trained_run).backbone_fingerprint() == trained.backbone_fingerprint()


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], "placeholder without a medium"),
        ([{"role": "user", "content": [{"type": "image", "image": "none.png"}]}], "none.png"),
        ([{"role": "user"}], "content"),
        ([], "messages"),
    ],
)
def test_bad_messages_are_refused(trained_run, messages, word):
    with pytest.raises(MokaError, match=word):
        moka.load(trained_run).generate(messages=messages)


def test_text_that_looks_like_a_placeholder_is_text(trained_run):
    loaded = moka.load(trained_run)
    assert isinstance(loaded.generate("What is <image> and <|im_end|>?", max_new_tokens=2), str)
    encoded = loaded.processor.encode([{"role": "user", "content": "What is <image>?"}])
    assert not any(encoded["mm_token_type_ids"])


def test_batch_answers_as_one_by_one(trained_run):
    loaded = moka.load(trained_run)
    samples = EmbeddedTask("audio-visual-text", "test", size=4)
    chats = [samples[i]["messages"][:1] for i in range(4)] + [[{"role": "user", "content": "Which?"}]]
    together = loaded.generate_batch(chats, max_new_tokens=4)
    assert together == [loaded.generate(messages=chat, max_new_tokens=4) for chat in chats]


def test_a_run_loads_in_another_dtype_and_is_still_known_by_its_backbone(trained_run):
    loaded = moka.load(trained_run, dtype="bfloat16")
    assert loaded.model.get_base_model().language_model.dtype == torch.bfloat16
    full = moka.load(trained_run).model.get_base_model()
    assert loaded.model.get_base_model().backbone_fingerprint() == full.backbone_fingerprint()


def test_models_of_one_backbone_keep_it_once_and_answer_as_before(trained_run, lora_run):
    models = [moka.load(trained_run), moka.load(lora_run), moka.load(trained_run)]
    question = "which digit is written"
    before = [one.generate(question, max_new_tokens=4) for one in models]
    own = [{name: p.detach().clone() for name, p in one.model.named_parameters()} for one in models]
    saved = share_equal_weights(models)
    backbone = [one.model.get_base_model().language_model for one in models]
    embeddings = [one.get_input_embeddings().weight for one in backbone]
    assert len({weight.data_ptr() for weight in embeddings}) == 1
    whole = sum(p.nbytes for p in models[2].model.parameters())
    assert saved >= whole + sum(w.nbytes for w in embeddings[:1])
    assert share_equal_weights(models) == 0
    for one, mine in zip(models, own, strict=True):
        assert all(torch.equal(parameter, mine[name]) for name, parameter in one.model.named_parameters())
    assert [one.generate(question, max_new_tokens=4) for one in models] == before
