"""Qwen2.5-VL as the backbone, its own vision tower as the visual encoder: the numbers of transformers' own class."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import moka
from moka import MokaConfig, MokaError, MokaForConditionalGeneration
from moka.config import ModelSection
from moka.modeling.artifacts import save_result, trained_parts
from moka.modeling.build import adapter_parameters, attach_adapter, build_model, build_processor, count_parameters
from moka.modeling.encoders import build_encoder, build_front_end, tiny_encoder
from moka.modeling.positions import grid_positions
from moka.modeling.projectors import build_projector
from moka.testing.tiny import tiny_kind, write_tiny_backbone

SIZE = 84  # nine tokens
TOKENS = (SIZE // 28) ** 2
START, END, PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def picture(seed, size=(SIZE, SIZE)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_tiny_backbone("qwen2.5-vl", folder)
    return folder


@pytest.fixture(scope="module")
def modalities(folder):
    sound = {"type": "conv-audio", "frames": 8, "channels": [6], "width": 8, "num_tokens": 3, "dropout": 0.0}
    sight = {"type": "qwen2.5-vl", "name_or_path": str(folder), "image_size": SIZE}
    return {
        "visual": {"encoder": sight, "projector": {"type": "identity"}},
        "audio": {"encoder": sound, "projector": {"type": "linear"}},
    }


@pytest.fixture(scope="module")
def model(folder, modalities):
    torch.manual_seed(0)
    return MokaForConditionalGeneration.from_backbone(str(folder), modalities, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def both_inputs(model, reference, tokenizer, prompts, seed=0):
    """The same batch for the two models. ``#`` in a prompt is a picture between its marks; padding is on the left."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": SIZE**2, "longest_edge": SIZE**2})
    front_end = build_front_end(model.config.modalities["visual"]["encoder"])
    rows = [tokenizer(prompt.replace("#", START + PAD * TOKENS + END))["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    types = (ids == reference.config.image_token_id).long()
    pictures = [picture(seed + i) for i in range(sum(p.count("#") for p in prompts))]
    theirs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    ours = {**theirs, "input_ids": ids.masked_fill(types > 0, model.config.image_token_id)}
    if pictures:
        theirs |= processor(pictures, return_tensors="pt")
        ours["pixel_values"] = torch.tensor(np.stack([front_end(one) for one in pictures]))
    return ours, theirs


PROMPTS = {
    "one picture": ["What is # shown?"],
    "two pictures": ["# and #: the same?"],
    "left padding": ["Yes: # what?", "Which digit is written in the picture # here, A or B?"],
    "a row without": ["What is shown in # it?", "yes no"],
    "text only": ["The quick brown fox"],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_logits_and_greedy_answers_are_those_of_transformers(model, reference, tokenizer, prompts):
    ours, theirs = both_inputs(model, reference, tokenizer, prompts)
    real = ours["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**ours).logits[real], reference(**theirs).logits[real], atol=1e-5, rtol=0)
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    mine, own = model.generate(**ours, **settings), reference.generate(**theirs, **settings)
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(own.logits), atol=1e-5, rtol=0)
    start = ours["input_ids"].shape[1]
    assert torch.equal(mine.sequences[:, start:], own.sequences[:, start:])


def test_positions_are_those_of_transformers(model, reference, tokenizer):
    ours, theirs = both_inputs(model, reference, tokenizer, ["Yes: # what?", "# and # in the picture?"])
    mask = ours["attention_mask"]
    expected, deltas = reference.model.get_rope_index(**{k: v for k, v in theirs.items() if k != "pixel_values"})
    found = grid_positions(ours["mm_token_type_ids"], mask, [([1, 2], (3, 3))])
    assert torch.equal(found, expected)
    assert torch.equal(found.amax((0, 2)) + 1 - mask.sum(-1), deltas[:, 0])


def test_frames_without_text_between_are_pictures_of_their_own():
    types = torch.tensor([[0, 2, 2, 2, 2, 2, 2, 2, 2, 0, 3, 3, 0]])
    positions = grid_positions(types, torch.ones_like(types), [([1, 2], (2, 2))])
    assert positions[0, 0].tolist() == [0, 1, 1, 1, 1, 3, 3, 3, 3, 5, 6, 7, 8]
    assert positions[1, 0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8]
    assert positions[2, 0].tolist() == [0, 1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8]


def test_steps_by_hand_over_a_cache_equal_one_forward(model, reference, tokenizer):
    ours, _ = both_inputs(model, reference, tokenizer, ["Yes: # what?", "Which digit # is it then?"])
    ours = {**ours, "input_ids": torch.cat([ours["input_ids"], torch.tensor([[70, 71], [72, 73]])], 1)}
    length = ours["input_ids"].shape[1]
    ours["attention_mask"] = torch.nn.functional.pad(ours["attention_mask"], (0, 2), value=1)
    ours["mm_token_type_ids"] = torch.nn.functional.pad(ours["mm_token_type_ids"], (0, 2))
    with torch.no_grad():
        full = model(**ours).logits[:, -2:]
        first = {k: v[:, : length - 2] if k != "pixel_values" else v for k, v in ours.items()}
        cache, logits = DynamicCache(config=model.config), []
        model(**first, past_key_values=cache, use_cache=True)
        for at in (length - 2, length - 1):
            step = {
                "input_ids": ours["input_ids"][:, at : at + 1],
                "attention_mask": ours["attention_mask"][:, : at + 1],
            }
            logits.append(model(**step, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), full, atol=1e-5, rtol=0)


def test_a_second_turn_with_a_picture_over_the_cache_of_the_first(model, reference, tokenizer):
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    first, _ = both_inputs(model, reference, tokenizer, ["What is # shown?"])
    second, _ = both_inputs(model, reference, tokenizer, ["and # here?"], seed=5)
    made = model.generate(**first, **settings, past_key_values=DynamicCache(config=model.config))
    answer = made.sequences[:, first["input_ids"].shape[1] :]
    ids = torch.cat([first["input_ids"], answer, second["input_ids"]], 1)
    types = torch.cat([first["mm_token_type_ids"], 0 * answer, second["mm_token_type_ids"]], 1)
    pixels, mask = torch.cat([first["pixel_values"], second["pixel_values"]]), torch.ones_like(ids)
    full = {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": mask, "pixel_values": pixels}
    cached = made.past_key_values.get_seq_length()
    new = {**full, "input_ids": ids[:, cached:], "mm_token_type_ids": types[:, cached:]}
    expected = torch.stack(model.generate(**full, **settings).logits)
    for inputs in (full, {**new, "pixel_values": second["pixel_values"]}):
        again = model.generate(**inputs, **settings, past_key_values=copy.deepcopy(made.past_key_values))
        torch.testing.assert_close(torch.stack(again.logits), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_other_ways_to_generate_agree_on_positions(model, reference, tokenizer, options):
    ours, theirs = both_inputs(model, reference, tokenizer, PROMPTS["left padding"])
    start = ours["input_ids"].shape[1]
    mine, own = model.generate(**ours, **GREEDY, **options), reference.generate(**theirs, **GREEDY, **options)
    assert torch.equal(mine[:, start:], own[:, start:])


def test_the_vision_tower_is_an_encoder_and_no_part_of_the_language_model(model, reference):
    assert not [name for name, _ in model.language_model.named_modules() if "visual" in name or "merger" in name]
    visual = reference.model.visual.state_dict()
    assert all(torch.equal(value, visual[name]) for name, value in model.encoders["visual"].model.state_dict().items())
    assert not any(p.requires_grad for p in model.encoders["visual"].parameters())
    assert list(model.projectors["visual"].parameters()) == []
    assert trained_parts(model) == ["encoders.audio", "projectors.audio"]


def test_the_adapter_reaches_the_seven_projections_of_the_language_model_only(folder, modalities):
    model = MokaForConditionalGeneration.from_backbone(str(folder), modalities, dtype=torch.float32)
    predicted = adapter_parameters(model, {})
    adapted = attach_adapter(model, {})
    assert count_parameters(adapted)["adapter"] == predicted > 0
    names = {n for n, m in adapted.named_modules() if hasattr(m, "moka_A")}
    assert len(names) == 7 * model.config.text_config.num_hidden_layers
    assert all(".language_model.model.layers." in name for name in names)


def flatten(folder):
    """The configuration as older versions of transformers wrote it: that of the language model at the top level."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    for key in ("rope_parameters", "model_type"):
        config["vision_config"].pop(key)
    flat = {**text, "rope_theta": rope["rope_theta"], "rope_scaling": scaling, **config}
    (folder / "config.json").write_text(json.dumps(flat), "utf-8")


@pytest.mark.parametrize("layout", ["names in memory", "tied", "flat configuration"])
def test_a_checkpoint_in_another_layout_is_read(folder, modalities, tokenizer, tmp_path, layout):
    """transformers 5 names the parts otherwise in memory than in files; small checkpoints tie their embeddings."""
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    shutil.copytree(folder, tmp_path / "copy")
    if layout == "flat configuration":
        flatten(tmp_path / "copy")
    elif layout == "tied":
        reference.config.tie_word_embeddings = reference.config.text_config.tie_word_embeddings = True
        reference.lm_head.weight = reference.get_input_embeddings().weight
        reference.save_pretrained(tmp_path / "copy")
    else:
        save_file(reference.state_dict(), tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    sight = {**modalities["visual"]["encoder"], "name_or_path": str(tmp_path / "copy")}
    visual = {**modalities["visual"], "encoder": sight}
    model = MokaForConditionalGeneration.from_backbone(str(tmp_path / "copy"), {"visual": visual}, dtype=torch.float32)
    ours, theirs = both_inputs(model, reference, tokenizer, PROMPTS["one picture"])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**ours).logits, reference(**theirs).logits, atol=1e-5, rtol=0)
    assert model.config.tie_word_embeddings == (layout == "tied")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(folder, modalities, reference, tokenizer, reentrant):
    torch.manual_seed(5)
    model = MokaForConditionalGeneration.from_backbone(str(folder), modalities, dtype=torch.float32)
    adapted = attach_adapter(model, {"dropout": 0.0})
    for name, parameter in adapted.named_parameters():
        if "moka_B" in name:
            parameter.data.normal_(std=0.1)
    ours, _ = both_inputs(model, reference, tokenizer, PROMPTS["left padding"])
    ours["labels"] = ours["input_ids"].clone()
    ours["labels"][:, :-3] = -100

    def gradients():
        adapted.zero_grad()
        adapted.train()(**ours).loss.backward()
        return {name: p.grad.clone() for name, p in adapted.named_parameters() if "moka_" in name}

    expected = gradients()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    adapted.enable_input_require_grads()
    found = gradients()
    assert expected
    assert all(value.abs().sum() > 0 for name, value in expected.items() if "moka_B" in name)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_a_saved_model_gives_equal_logits(model, reference, tokenizer, tmp_path):
    ours, _ = both_inputs(model, reference, tokenizer, PROMPTS["two pictures"])
    model.save_pretrained(tmp_path)
    again = MokaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**ours).logits, model(**ours).logits)


def test_a_trained_adapter_folder_is_loaded_with_its_pictures(folder, modalities, tmp_path):
    torch.manual_seed(3)
    model, processor = build_model(ModelSection(backbone=str(folder), modalities=modalities, dtype="float32"))
    adapted = attach_adapter(model, {"dropout": 0.0})
    for name, parameter in adapted.named_parameters():
        if "moka_B" in name:
            parameter.data.normal_(std=0.1)
    adapted.eval()
    save_result(adapted, processor, tmp_path / "adapter")
    loaded = moka.load(tmp_path / "adapter", dtype="float32", device="cpu")
    content = [{"type": "image", "image": picture(1, (50, 120))}, {"type": "text", "text": "What is shown?"}]
    batch = processor([{"role": "user", "content": content}])
    batch.pop("labels")
    with torch.no_grad():
        expected = adapted(**batch).logits
        torch.testing.assert_close(loaded.model(**batch).logits, expected, atol=1e-5, rtol=0)
        with adapted.disable_adapter():
            assert (adapted(**batch).logits - expected).abs().max() > 1e-3


def test_an_adapted_model_generates_the_same_with_and_without_cache(folder, modalities, reference, tokenizer):
    torch.manual_seed(4)
    model = MokaForConditionalGeneration.from_backbone(str(folder), modalities, dtype=torch.float32)
    config = MokaConfig(init_weights=False, dropout=0.0, modules_to_save=trained_parts(model), task_type="CAUSAL_LM")
    adapted: PeftModel = get_peft_model(model, config).eval()
    ours, _ = both_inputs(model, reference, tokenizer, PROMPTS["left padding"])
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (adapted.generate(**ours, **settings, use_cache=use).logits for use in (True, False))
    torch.testing.assert_close(torch.stack(cached), torch.stack(plain), atol=1e-4, rtol=0)


def test_the_skeleton_has_the_sizes_of_the_model(folder, modalities, model):
    skeleton, processor = build_processor(ModelSection(backbone=str(folder), modalities=modalities))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == shapes
    assert processor.modalities["visual"]["tokens"] == TOKENS


def test_the_front_end_gives_the_pixels_of_the_checkpoints_processor(folder):
    front_end = build_front_end({"type": "qwen2.5-vl", "name_or_path": str(folder), "image_size": SIZE})
    image = picture(2)
    expected = Qwen2VLImageProcessorPil.from_pretrained(folder)(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(front_end(image), expected)
    assert np.array_equal(build_front_end({"type": "qwen2.5-vl"}, front_end.to_dict())(image), expected)


def test_pictures_of_any_shape_and_mode_become_the_fixed_square(folder):
    front_end = build_front_end({"type": "qwen2.5-vl", "name_or_path": str(folder), "image_size": SIZE})
    wide = Image.new("L", (300, 40), 255)
    values = front_end(wide)
    assert values.shape == ((SIZE // 14) ** 2, 1176)
    red = values.reshape(36, 3, 2, 14, 14)[:, 0]
    assert np.allclose(red, (1 - 0.48145466) / 0.26862954)
    with pytest.raises(MokaError, match="this encoder takes images"):
        front_end("picture.png")


def test_an_items_features_do_not_depend_on_the_batch(model):
    encoder = model.encoders["visual"]
    values = torch.randn(3, *encoder.input_shape, generator=torch.Generator().manual_seed(0))
    single = torch.cat([encoder(one[None]) for one in values])
    torch.testing.assert_close(encoder(values), single, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"image_size": 90}, "multiple of 28.*such as 84"), ({"image_size": SIZE, "layer": -2}, "merger reads the last")],
)
def test_an_encoder_that_cannot_be_is_refused(folder, config, message):
    with pytest.raises(MokaError, match=message):
        build_encoder({"type": "qwen2.5-vl", "name_or_path": str(folder), **config})


def test_a_checkpoint_of_another_kind_is_refused(backbones):
    with pytest.raises(MokaError, match=r"has a model of type 'qwen2'.*expected 'qwen2_5_vl'"):
        build_encoder({"type": "qwen2.5-vl", "name_or_path": str(backbones["qwen2"])})


def test_identity_wants_the_width_of_the_language_model():
    projector = build_projector({"type": "identity"}, 9, 32, 32)
    features = torch.randn(2, 9, 32)
    assert torch.equal(projector(features), features)
    assert projector.num_tokens == 9
    assert projector(features[:0]).shape == (0, 9, 32)
    with pytest.raises(MokaError, match=r"expected \[items, 9, 32\]"):
        projector(features[:, :8])
    with pytest.raises(MokaError, match=r"width 1024.*64"):
        build_projector({"type": "identity"}, 9, 1024, 64)


def test_the_tiny_stand_in_fits_its_own_encoder():
    assert tiny_kind("Qwen/Qwen2.5-VL-7B-Instruct") == tiny_kind("a/qwen2_5_vl_3b") == "qwen2.5-vl"
    assert tiny_kind("Qwen/Qwen2.5-7B-Instruct") == "qwen2"
    config = tiny_encoder({"type": "qwen2.5-vl", "name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "image_size": 224})
    section = ModelSection(
        backbone="tiny:qwen2.5-vl", modalities={"visual": {"encoder": config, "projector": {"type": "identity"}}}
    )
    model, processor = build_model(section)
    content = [{"type": "video", "video": [picture(0), picture(1)]}, {"type": "text", "text": "What?"}]
    batch = processor([{"role": "user", "content": content}])
    assert batch["pixel_values"].shape == (2, 16, 1176)
    assert model(**batch).logits.isfinite().all()


def test_a_prompt_through_the_processor_has_the_marks_and_logits_of_transformers(folder, modalities):
    model, processor = build_model(ModelSection(backbone=str(folder), modalities=modalities, dtype="float32"))
    frames = [picture(0), picture(1)]
    chat = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "What?"}]}]
    batch = processor(chat)
    batch.pop("labels")
    shown = START + PAD * TOKENS + END
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    text = f"{system}<|im_start|>user\n{shown * 2}What?<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": SIZE**2, "longest_edge": SIZE**2})(
        frames, return_tensors="pt"
    )
    pads = ids == theirs.config.image_token_id
    expected = theirs(
        input_ids=ids, mm_token_type_ids=pads.long(), attention_mask=torch.ones_like(ids), **images
    ).logits
    torch.testing.assert_close(model.eval()(**batch).logits, expected, atol=1e-5, rtol=0)
    # The marks are scaffold: they belong to no modality and take no part in the interaction.
    marks = torch.isin(ids, torch.tensor(processor.tokenizer.convert_tokens_to_ids([START, END])))
    assert marks.sum() == 4
    assert not batch["mm_token_type_ids"][marks].any()
    assert not batch["interaction_ids"][marks].any()
