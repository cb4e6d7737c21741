"""MokA on transformers' own multimodal models, tiny and random: the towers stay bare, the ids come from the model.

Each model's inputs are built as its processor would: the placeholder token repeated once per feature, and the media
next to it. Capital letters of a layout are media (I image, V video, A sound), ``q`` question text, ``a`` an answer.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen2_5_omni_modeling
from transformers.models.qwen2_audio import modeling_qwen2_audio as qwen2_audio_modeling

import moka
from moka.adapter import MokaLinear
from moka.adapter.config import DEFAULT_TARGETS
from moka.adapter.targets import placeholder_ids

VOCABULARY = 128
IMAGE, VIDEO, AUDIO, VISION_START, VISION_END, AUDIO_START, AUDIO_END = SPECIAL = range(120, 127)
PLACEHOLDER = {"I": (IMAGE, 1), "V": (VIDEO, 2), "A": (AUDIO, 3)}  # letter -> token, type
AROUND = {"I": (VISION_START, VISION_END), "V": (VISION_START, VISION_END), "A": (AUDIO_START, AUDIO_END)}
ROW = {0: "", 1: "IV", 2: "A"}  # row of moka_A -> the letters that take it

# With the default initializer_range of 0.02 a tiny random model hardly looks at its context.
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.1}
TEXT = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MROPE = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
TOWER = {**SIZES, "num_hidden_layers": 2, "patch_size": 4}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "initializer_range": 0.1,
}
AUDIO_TOWER = {
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_source_positions": 8,
    "initializer_range": 0.1,
}
BY_INDEX = {"image_token_index": IMAGE, "video_token_index": VIDEO}
BY_ID = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def llava():
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER, image_size=8),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )


def llava_onevision():
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER, image_size=8, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_grid_pinpoints=[[8, 8]],
        **BY_INDEX,
    )


def video_llava():
    return tf.VideoLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER, image_size=8),
        text_config=tf.LlamaConfig(**TEXT),
        vision_feature_layer=-1,
        **BY_INDEX,
    )


def qwen2_vl():
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return tf.Qwen2VLConfig(text_config=dict(MROPE), vision_config={**tower, "initializer_range": 0.1}, **BY_ID)


def qwen2_5_vl():
    return tf.Qwen2_5_VLConfig(text_config=dict(MROPE), vision_config=dict(QWEN_TOWER), **BY_ID)


def qwen2_audio():
    return tf.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        audio_config={**AUDIO_TOWER, "model_type": "qwen2_audio_encoder"},
        audio_token_index=AUDIO,
    )


def qwen2_5_omni():
    return tf.Qwen2_5OmniThinkerConfig(
        text_config=dict(MROPE),
        vision_config=dict(QWEN_TOWER),
        audio_config={**AUDIO_TOWER, "n_window": 4, "output_dim": 32},
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        audio_token_index=AUDIO,
        **BY_INDEX,
    )


def idefics3(config_class=tf.Idefics3Config):
    return config_class(
        vision_config={**TOWER, "image_size": 16},
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def smolvlm():
    return idefics3(tf.SmolVLMConfig)


def pictures(count, *shape):
    return {"pixel_values": torch.randn(count, *shape)}


def stills(count, *shape):
    """Video-LLaVA's pictures, which transformers called otherwise before 5.23."""
    named = inspect.signature(tf.VideoLlavaForConditionalGeneration.forward).parameters
    return {"pixel_values" if "pixel_values" in named else "pixel_values_images": torch.randn(count, *shape)}


def clips(count, *shape):
    return {"pixel_values_videos": torch.randn(count, *shape)}


def anyres(count):
    return {**pictures(count, 2, 3, 8, 8), "image_sizes": torch.full((count, 2), 8)}


def qwen_pictures(count):
    grid = torch.tensor([[1, 4, 4]] * count)
    return {"pixel_values": torch.randn(16 * count, 3 * 2 * 4 * 4), "image_grid_thw": grid}


def qwen_clips(count):
    grid = torch.tensor([[2, 4, 4]] * count)
    return {"pixel_values_videos": torch.randn(32 * count, 3 * 2 * 4 * 4), "video_grid_thw": grid}


def omni_clips(count):
    return {**qwen_clips(count), "video_second_per_grid": torch.ones(count)}


def sounds(count):
    mask = torch.ones(count, 16, dtype=torch.long)
    return {"input_features": torch.randn(count, 8, 16), "feature_attention_mask": mask}


# Both text models moved between transformers 5.0 and 5.23.
OMNI_DECODER = "model.language_model" if hasattr(qwen2_5_omni_modeling, "Qwen2_5OmniThinkerModel") else "model"
AUDIO_DECODER = "model.language_model" if hasattr(qwen2_audio_modeling, "Qwen2AudioModel") else "language_model.model"


@dataclass(frozen=True)
class Case:
    """One multimodal model: how to build it, and what one piece of each of its media is."""

    model_class: type
    config: Callable
    media: dict[str, tuple[int, Callable]]  # letter -> placeholder tokens a piece, the forward's arguments for n pieces
    language_model: str = "model.language_model"
    mrope: bool = False  # its positions are made from mm_token_type_ids

    @property
    def layouts(self):
        """Two rows of different length: all of its media, and the first of them."""
        letters = list(self.media)
        return [f"t {' '.join(letters)} q q q a a", f"{letters[0]} q t q a"]


def pieces(tokens, make, *shape):
    return tokens, (lambda count: make(count, *shape)) if shape else make


CASES = {
    "llava": Case(tf.LlavaForConditionalGeneration, llava, {"I": pieces(4, pictures, 3, 8, 8)}),
    "llava_onevision": Case(
        tf.LlavaOnevisionForConditionalGeneration,
        llava_onevision,
        {"I": pieces(10, anyres), "V": pieces(4, clips, 3, 3, 8, 8)},
    ),
    "video_llava": Case(
        tf.VideoLlavaForConditionalGeneration,
        video_llava,
        {"I": pieces(4, stills, 3, 8, 8), "V": pieces(10, clips, 2, 3, 8, 8)},
    ),
    "qwen2_vl": Case(
        tf.Qwen2VLForConditionalGeneration,
        qwen2_vl,
        {"I": pieces(4, qwen_pictures), "V": pieces(8, qwen_clips)},
        mrope=True,
    ),
    "qwen2_5_vl": Case(
        tf.Qwen2_5_VLForConditionalGeneration,
        qwen2_5_vl,
        {"I": pieces(4, qwen_pictures), "V": pieces(8, qwen_clips)},
        mrope=True,
    ),
    "qwen2_audio": Case(tf.Qwen2AudioForConditionalGeneration, qwen2_audio, {"A": pieces(4, sounds)}, AUDIO_DECODER),
    "qwen2_5_omni": Case(
        tf.Qwen2_5OmniThinkerForConditionalGeneration,
        qwen2_5_omni,
        {"I": pieces(4, qwen_pictures), "V": pieces(8, omni_clips), "A": pieces(4, sounds)},
        OMNI_DECODER,
    ),
    "idefics3": Case(
        tf.Idefics3ForConditionalGeneration, idefics3, {"I": pieces(4, pictures, 1, 3, 16, 16)}, "model.text_model"
    ),
    "smolvlm": Case(
        tf.SmolVLMForConditionalGeneration, smolvlm, {"I": pieces(4, pictures, 1, 3, 16, 16)}, "model.text_model"
    ),
}


def backbone(case):
    torch.manual_seed(0)
    return case.model_class(case.config()).eval()


def adapted(case, tiny, base=None, **overrides):
    base = backbone(case) if base is None else base
    return tiny.strong_(get_peft_model(base, tiny.config(**{"modality_token_ids": None, **overrides}))).eval()


@dataclass(frozen=True)
class Prompt:
    """A left-padded batch of a model's media and text."""

    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer: torch.Tensor  # bool
    media: dict[str, torch.Tensor]

    @property
    def tokens(self):
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.media}

    @property
    def everything(self):
        return {**self.tokens, "mm_token_type_ids": self.mm_token_type_ids}

    @property
    def labels(self):
        return torch.where(self.answer, self.input_ids, -100)

    def with_token(self, row, position, value):
        changed = self.input_ids.clone()
        changed[row, position] = value
        assert not torch.equal(changed, self.input_ids)
        return replace(self, input_ids=changed)


def prompt(case, layouts=None, seed=3) -> Prompt:
    torch.manual_seed(seed)
    rows = []
    layouts = case.layouts if layouts is None else layouts
    for layout in layouts:
        ids, types, answer = [], [], []
        for letter in layout.split():
            if letter in PLACEHOLDER:
                (token, kind), (start, end), count = PLACEHOLDER[letter], AROUND[letter], case.media[letter][0]
                ids += [start, *[token] * count, end]
                types += [0, *[kind] * count, 0]
            else:
                ids.append(int(torch.randint(1, 120, ())))
                types.append(0)
            answer += [letter == "a"] * (len(ids) - len(answer))
        rows.append((ids, types, [1] * len(ids), answer))
    width = max(len(row[0]) for row in rows)
    columns = [torch.tensor([[0] * (width - len(row[k])) + row[k] for row in rows]) for k in range(4)]
    media = {}
    for letter, (_, make) in case.media.items():
        if count := sum(layout.count(letter) for layout in layouts):
            media |= make(count)
    return Prompt(*columns[:3], columns[3].bool(), media)


def takes_types(model):
    """Return whether Qwen-VL makes its positions of mm_token_type_ids: of transformers 5.3 and newer."""
    return "mm_token_type_ids" in inspect.signature(model.get_base_model().model.get_rope_index).parameters


def positions(model, batch):
    """Return the positions that Qwen-VL makes of mm_token_type_ids; if they are given, it needs no ids."""
    grids = {name: value for name, value in batch.media.items() if name.endswith("grid_thw")}
    if takes_types(model):
        grids["mm_token_type_ids"] = batch.mm_token_type_ids
    index, _ = model.get_base_model().model.get_rope_index(
        batch.input_ids, **grids, attention_mask=batch.attention_mask
    )
    return {"position_ids": index}


def generate(model, tokens, **options):
    """(new tokens, logits [steps, batch, vocabulary])."""
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(SPECIAL), **options}
    out = model.generate(**tokens, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -4:], torch.stack(out.logits)


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case, tiny):
    """Read-only."""
    return adapted(case, tiny)


@pytest.fixture
def batch(case):
    return prompt(case)


def logits_of(model, batch, **more):
    with torch.no_grad():
        return model(**{**batch.everything, **more}).logits


def test_only_the_language_models_projections_are_adapted(case, model):
    layers = {name for name, module in model.get_base_model().named_modules() if isinstance(module, MokaLinear)}
    inside = f"{case.language_model}.layers"
    parents = dict.fromkeys(DEFAULT_TARGETS[:4], "self_attn") | dict.fromkeys(DEFAULT_TARGETS[4:], "mlp")
    assert layers == {f"{inside}.{i}.{parent}.{leaf}" for i in range(2) for leaf, parent in parents.items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 28
    assert all(".moka_" in name and f"{inside}." in name for name in trained)
    assert len([m for m in model.modules() if isinstance(m, nn.Linear)]) > len(layers) + 1  # there are towers to leave


def test_placeholder_ids_come_from_the_models_config(case, model):
    tokens = sorted(PLACEHOLDER[letter][0] for letter in case.media if letter in "IV")
    expected = {"visual": tokens} if tokens else {}
    assert model.peft_config["default"].modality_token_ids == expected | (
        {"audio": [AUDIO]} if "A" in case.media else {}
    )


def test_given_and_derived_types_give_equal_logits(case, model, batch):
    given = logits_of(model, batch)
    # Qwen-VL needs mm_token_type_ids for its own positions, so without them the positions are given.
    own = positions(model, batch) if case.mrope else {}
    derived = logits_of(model, batch, mm_token_type_ids=None, **own)
    assert torch.equal(given, derived)
    with model.disable_adapter():
        bare = logits_of(model, batch)
    real = batch.attention_mask.bool()
    assert (given - bare)[real].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("to", ["text", "another modality"])
def test_moving_a_media_tokens_type_changes_the_logits(case, model, batch, to):
    own = positions(model, batch) if case.mrope else {}
    given = logits_of(model, batch, **own)
    media = batch.mm_token_type_ids[0].nonzero()[0]
    moved = batch.mm_token_type_ids.clone()
    moved[0, media] = 0 if to == "text" else 4 - moved[0, media]  # 1 <-> 3
    changed = logits_of(model, batch, **{**own, "mm_token_type_ids": moved})
    difference = (given - changed)[0].abs().amax(-1)
    assert difference[media:].min() > 1e-4
    assert difference[:media].max() == 0
    assert torch.equal(given[1], changed[1])


def test_every_modality_that_occurs_gets_gradients(case, tiny, batch):
    model = adapted(case, tiny).train()
    loss = model(**batch.everything, labels=batch.labels).loss
    loss.backward()
    occurs = [True, *(any(letter in case.media for letter in ROW[row]) for row in (1, 2))]
    first = rf"{re.escape(case.language_model)}\.layers\.0\."
    seen = 0
    for name, gradient in tiny.gradients(model).items():
        assert torch.isfinite(gradient).all(), name
        if "moka_B" in name:
            assert gradient.abs().max() > 0, name
        # Of the last layer, only media's keys and values reach the answer.
        elif re.search(first, name) or re.search("[kv]_proj", name):
            assert [bool(row.abs().max() > 0) for row in gradient] == occurs, name
            seen += 1
    assert seen == 9


def test_no_answer_token_changes_an_earlier_logit(case, tiny, batch):
    model = adapted(case, tiny).train()
    plain = logits_with_labels(model, batch)
    answer = batch.answer[0].nonzero()[0].item()
    for position in range(answer, batch.answer.shape[1]):
        changed = logits_with_labels(model, batch.with_token(0, position, 117))
        assert torch.equal(plain[0, :position], changed[0, :position])
        assert (plain[0, position:] - changed[0, position:]).abs().amax(-1).min() > 1e-4
    # What makes this able to fail: the question does reach the media before it.
    media = batch.mm_token_type_ids[0].nonzero()[0].item()
    asked = logits_with_labels(model, batch.with_token(0, answer - 1, 117))
    assert (plain[0, media] - asked[0, media]).abs().max() > 1e-4


def logits_with_labels(model, batch):
    """Return logits in training, with the keys derived from the labels of the answer."""
    return model(**batch.everything, labels=batch.labels).logits.detach()


def test_training_without_a_question_is_an_error(case, tiny, batch):
    model = adapted(case, tiny).train()
    with pytest.raises(moka.MokaError, match=r"turn_markers.*labels.*interaction_ids") as caught:
        model(**batch.everything)
    assert "Row 0 " in str(caught.value)


def test_cached_generation_equals_recompute(case, model, batch):
    if case.language_model == "model.text_model" and Version(tf.__version__) < Version("5.5"):
        pytest.skip(
            f"{case.model_class.__name__} before transformers 5.5 without a cache: the bare model differs as well"
        )
    tokens, logits = generate(model, batch.everything)
    again, recomputed = generate(model, batch.everything, use_cache=False)
    assert torch.equal(tokens, again)
    same(logits, recomputed)
    same(logits[0], logits_of(model, batch)[:, -1])
    with model.disable_adapter():
        _, bare = generate(model, batch.everything)
    assert (logits[0] - bare[0]).abs().max() > 0.01


def test_generation_with_given_ids_equals_derived(case, model, batch):
    own = {}
    if case.mrope and takes_types(model):  # so here they are given, after those of the text
        text = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)[None]
        own["position_ids"] = torch.cat([text, positions(model, batch)["position_ids"]])
    same(generate(model, batch.everything)[1], generate(model, {**batch.tokens, **own})[1])


def test_left_padded_batch_equals_singles(case, model):
    """Forward and generation of two prompts of different length, each with media of its own."""
    both = prompt(case)
    assert both.attention_mask[1, 0] == 0
    tokens, logits = generate(model, both.everything)
    full = logits_of(model, both)
    for i, single in enumerate(singles(case, both)):
        single_tokens, steps = generate(model, single.everything)
        assert torch.equal(tokens[i], single_tokens[0])
        same(logits[:, i], steps[:, 0])
        real = both.attention_mask[i].bool()
        same(full[i, real], logits_of(model, single)[0])


def singles(case, both):
    """The rows of ``both`` without padding, with their own media: each row has one piece of each letter it names."""
    for i, layout in enumerate(case.layouts):
        real, media = both.attention_mask[i].bool(), {}
        for letter, (_, make) in case.media.items():
            if letter not in layout:
                continue
            total = sum(row.count(letter) for row in case.layouts)
            before = sum(row.count(letter) for row in case.layouts[:i])
            for name in make(1):
                size = both.media[name].shape[0] // total
                media[name] = both.media[name][before * size : (before + 1) * size]
        columns = [t[i, real][None] for t in (both.input_ids, both.mm_token_type_ids, both.attention_mask, both.answer)]
        yield Prompt(*columns, media)


def test_save_and_load_round_trip_is_exact(case, model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(case), tmp_path).eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    assert loaded.peft_config["default"].modality_token_ids == model.peft_config["default"].modality_token_ids


def test_merging_keeps_the_logits(case, tiny, batch):
    model = adapted(case, tiny)
    weight = model.get_base_model().get_submodule(f"{case.language_model}.layers.0.self_attn.q_proj").base_layer.weight
    plain, bare, steps = logits_of(model, batch), weight.clone(), generate(model, batch.everything)[1]
    model.merge_adapter()
    assert (weight - bare).abs().max() > 1e-3
    same(logits_of(model, batch), plain)
    same(generate(model, batch.everything)[1], steps)
    model.unmerge_adapter()
    same(logits_of(model, batch), plain)


def train(model, batches):
    """All forwards, then one backward."""
    model.train()
    losses = [model(**batch.everything, labels=batch.labels, use_cache=False).loss for batch in batches]
    sum((i + 1) * loss for i, loss in enumerate(losses)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", [1, 2], ids=["one forward", "two forwards"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the frozen towers
def test_checkpointing_changes_no_gradient(case, tiny, reentrant, count):
    # The second batch has the rows of the first the other way round, and so another routing of the same shape.
    batches = [prompt(case), prompt(case, case.layouts[::-1], seed=5)][:count]
    expected = train(adapted(case, tiny), batches)
    model = adapted(case, tiny)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    network = model.get_base_model().get_submodule(case.language_model)
    assert network.layers[0].gradient_checkpointing
    calls = []
    network.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    ours = train(model, batches)
    assert len(calls) == 2 * count  # each forward ran again in the backward pass
    assert len(ours) == 28
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


# What follows is about choosing layers and token ids in models that nest otherwise.


def omni(**overrides):
    """Return a complete Qwen2.5-Omni: thinker, and a talker and a vocoder with layers of the same names."""
    vocoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ff_mult": 1, "dim": 32}
    config = tf.Qwen2_5OmniConfig(
        thinker_config=qwen2_5_omni().to_dict(),
        talker_config={**MROPE, "embedding_size": 32, "head_dim": 8},
        token2wav_config={"dit_config": {**vocoder, "emb_dim": 32, "head_dim": 16}, "bigvgan_config": {}},
        **overrides,
    )
    with torch.device("meta"):
        return tf.Qwen2_5OmniForConditionalGeneration(config)


def chosen(model, **settings):
    """Names of the layers that an adapter with default targets takes, up to their last part."""
    settings = {"task_type": None, "modality_token_ids": None, **settings}
    config = moka.MokaConfig(r=2, dropout=0.0, **settings)
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True).get_base_model()
    names = [name for name, module in adapted.named_modules() if isinstance(module, MokaLinear)]
    assert len(names) == len(set(names))
    return {name.rpartition(".")[0] for name in names}, len(names), config


def blocks(prefix, *indices):
    return {f"{prefix}.layers.{i}.{part}" for i in indices for part in ("self_attn", "mlp")}


def test_of_a_speaking_model_the_thinkers_text_is_adapted():
    parents, count, config = chosen(omni())
    assert parents == blocks(f"thinker.{OMNI_DECODER}", 0, 1)
    assert count == 14
    assert config.modality_token_ids == {"visual": [IMAGE, VIDEO], "audio": [AUDIO]}


def test_generating_with_the_speaking_model_equals_its_thinker(tiny):
    torch.manual_seed(0)
    base = tf.Qwen2_5OmniForConditionalGeneration(
        tf.Qwen2_5OmniConfig(thinker_config=qwen2_5_omni().to_dict(), enable_audio_output=False)
    )
    # For text, its generate asks for no more of the talker and the speaker than this.
    base.talker, base.speaker_map = SimpleNamespace(codec_pad_token=0), {"Chelsie": {}}
    model, batch = adapted(None, tiny, base.eval()), prompt(CASES["qwen2_5_omni"])
    with moka.routing(model, mm_token_type_ids=batch.mm_token_type_ids):
        expected = generate(model.get_base_model().thinker, batch.tokens)[1]
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(SPECIAL)}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    settings = {f"thinker_{name}": value for name, value in settings.items()}

    def logits(tokens):
        return torch.stack(model.generate(**tokens, **settings, generation_mode="text").logits)

    same(logits(batch.everything), expected)
    same(logits(batch.tokens), expected)
    moved = {**batch.everything, "mm_token_type_ids": torch.zeros_like(batch.input_ids)}
    assert (logits(moved) - expected)[0].abs().amax(-1).min() > 1e-3


class Wrapper(nn.Module):
    """Someone's own network: encoder and language model with layers of the same names, and no ``get_decoder``."""

    def __init__(self, language_models=("language_model",)):
        super().__init__()
        self.encoder = tf.CLIPVisionModel(tf.CLIPVisionConfig(**TOWER, image_size=8))
        for name in language_models:
            setattr(self, name, tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)))


def test_of_a_custom_network_its_language_model_is_adapted():
    parents, count, config = chosen(Wrapper())
    assert parents == blocks("language_model.model", 0, 1)
    assert count == 14
    assert config.modality_token_ids == {}


def test_of_two_language_models_neither_is_preferred():
    parents, _, _ = chosen(Wrapper(("one", "two")))
    assert parents >= blocks("one.model", 0, 1) | blocks("two.model", 0, 1)


@pytest.mark.parametrize(("layers", "indices"), [([1], [1]), (0, [0]), ([0, 1], [0, 1]), ([], [0, 1])])
@pytest.mark.parametrize("pattern", [None, "layers"])
def test_layers_to_transform_counts_the_language_models_blocks(layers, indices, pattern, tmp_path):
    base = backbone(CASES["llava"])
    parents, count, config = chosen(base, layers_to_transform=layers, layers_pattern=pattern)
    assert parents == blocks("model.language_model", *indices)
    assert count == 7 * len(indices)
    config.save_pretrained(tmp_path)
    assert moka.MokaConfig.from_pretrained(tmp_path).target_modules == config.target_modules


def test_cross_attention_is_refused_and_the_model_is_left_as_it_was():
    """Its keys and values are the image's tokens, which are not among the sequence's."""
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "bos_token_id": 1}
    vision = {"hidden_size": 32, "attention_heads": 4, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"intermediate_size": 48, "image_size": 8, "patch_size": 4, "vision_output_dim": 64}
    config = tf.MllamaConfig(
        text_config=text, vision_config={**vision, "intermediate_layers_indices": [0]}, image_token_index=IMAGE
    )
    model = tf.MllamaForConditionalGeneration(config)
    with pytest.raises(moka.MokaError, match=r"MllamaForConditionalGeneration.*layers\.1\.cross_attn"):
        chosen(model)
    assert not any(isinstance(m, MokaLinear) or m._forward_pre_hooks for m in model.modules())


class Embedded(tf.LlamaModel):
    """A decoder that contains its vision tower, as Phi-4-multimodal's does."""

    def __init__(self, config):
        super().__init__(config)
        self.vision = tf.CLIPVisionModel(tf.CLIPVisionConfig(**TOWER, image_size=8))


def test_a_tower_within_the_decoder_is_left_only():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
    model.model = Embedded(model.config)
    parents, count, _ = chosen(model)
    assert parents == blocks("model", 0, 1)
    assert count == 14


def test_placeholder_ids_of_nested_configurations():
    config = tf.Phi4MultimodalConfig(
        vision_config={"image_token_id": IMAGE}, audio_config={"audio_token_id": AUDIO}, **TEXT
    )
    model = nn.Module()
    model.config = config
    assert placeholder_ids(model, moka.MokaConfig()) == {"visual": [IMAGE], "audio": [AUDIO]}
    config.image_token_id = VIDEO  # the outer name wins
    assert placeholder_ids(model, moka.MokaConfig())["visual"] == [VIDEO]


def test_an_adapted_assistant_model_drafts_what_is_generated(case, tiny, model):
    """Its first call has the prompt's ids and one token more than they cover."""
    row = prompt(case, case.layouts[1:])
    plain, _ = generate(model, row.everything)
    twin = adapted(case, tiny)
    for draft in (twin, twin.get_base_model()):
        tokens, _ = generate(model, row.everything, assistant_model=draft)
        assert torch.equal(tokens, plain)
