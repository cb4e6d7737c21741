"""The composed model: media land where they belong, and every way to the same numbers gives the same numbers."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel

from moka import MokaConfig, MokaError, MokaForConditionalGeneration, MokaProcessor
from moka.modeling.media import AudioFeatures, Waveform

IMAGE, AUDIO = (
    {"type": "conv-image", "image_size": 8, "channels": [4, 4], "width": 8, "num_tokens": 2},
    {
        "type": "conv-audio",
        "frames": 8,
        "channels": [6],
        "width": 8,
        "num_tokens": 3,
    },
)
CONV = {
    "visual": {"encoder": {**IMAGE, "dropout": 0.0}, "projector": {"type": "linear"}},
    "audio": {"encoder": {**AUDIO, "dropout": 0.0}, "projector": {"type": "mlp"}},
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 80,
    "max_source_positions": 10,
    "pad_token_id": 0,
}
QFORMER = {"type": "qformer", "queries": 3, "hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 32}
TOWERS = {
    "visual": {"encoder": {"type": "clip", "model_config": CLIP}, "projector": {**QFORMER, "dropout": 0.0}},
    "audio": {"encoder": {"type": "whisper", "model_config": WHISPER}, "projector": {"type": "mlp", "tokens": 2}},
}
TYPES = {"image": 1, "video": 2, "audio": 3}
NEW = 5


def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 9), dtype=np.uint8))


def audio(seed):
    return AudioFeatures(np.random.default_rng(seed).normal(0, 40, (6, 13)).astype(np.float32), "mfcc")


def wave(seed):
    return Waveform(np.random.default_rng(seed).normal(0, 0.1, 1600).astype(np.float32), 16000)


def medium(kind, seed):
    if kind == "video":
        return [image(seed), image(seed + 100), image(seed + 200)]
    return image(seed) if kind == "image" else audio(seed)


def chat(layout, answer=None, seed=0, sound=audio):
    """``"image which audio same"``: media by their names among words."""
    content = []
    for number, word in enumerate(layout.split()):
        if word in TYPES:
            made = sound(seed + number) if word == "audio" else medium(word, seed + number)
            content.append({"type": word, word: made})
        else:
            content.append({"type": "text", "text": word})
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


QUESTIONS = [
    "image which digit",
    "audio image audio is the same",
    "which digit is spoken",
    "video two video audio same",
]
ANSWERS = ["seven", "yes", "no no", "four"]


def build(folder, modalities=CONV, **kwargs):
    torch.manual_seed(1)
    model = MokaForConditionalGeneration.from_backbone(folder, modalities, **kwargs)
    # At their own small scale the projected tokens would hardly change a logit.
    for projector in model.projectors.values():
        projector.output.weight.data.normal_(std=0.2)
    return model.eval()


def adapt(model, **overrides):
    settings = {"dropout": 0.0, "init_weights": False, "task_type": "CAUSAL_LM", **overrides}
    torch.manual_seed(2)
    parts = [f"{kind}.{name}" for kind in ("encoders", "projectors") for name in ("visual", "audio")]
    return get_peft_model(model, MokaConfig(**{"modules_to_save": parts, **settings})).eval()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request, backbones):
    return backbones[request.param]


@pytest.fixture(scope="module")
def model(folder):
    return build(folder)


@pytest.fixture(scope="module")
def processor(model, folder):
    return MokaProcessor.from_model(model, AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def adapted(folder):
    return adapt(build(folder))


@pytest.fixture(scope="module")
def asked(processor):
    return processor([chat(q, seed=i) for i, q in enumerate(QUESTIONS)])


@pytest.fixture(scope="module")
def taught(processor):
    chats = [chat(q, a, seed=i) for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))]
    return processor(chats, add_generation_prompt=False)


def same(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def generate(model, batch, **options):
    """New tokens [batch, new] and their logits [new, batch, vocab]."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    out = model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, batch, **kwargs):
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), gradients(model)


# --- saving and loading


def test_a_saved_model_gives_equal_logits(model, asked, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MokaForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded, asked), logits_of(model, asked), rtol=0, atol=0)
    assert torch.equal(generate(loaded, asked)[0], generate(model, asked)[0])
    assert loaded.config.fill_token_id == model.config.fill_token_id == 1
    assert loaded.config.backbone == model.config.backbone


def test_tied_embeddings_are_saved_once_and_tied_again(model, tmp_path):
    tied = model.config.text_config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tables = [k for k in file.keys() if k.endswith(("embed_tokens.weight", "lm_head.weight"))]  # noqa: SIM118
    assert len(tables) == (1 if tied else 2)
    loaded = MokaForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert not any(p.is_meta for p in loaded.parameters())


def test_auto_model_reads_the_folder_after_import_moka(backbones, tmp_path):
    build(backbones["llama"]).save_pretrained(tmp_path)
    code = (
        "import sys, moka, transformers as t; m = t.AutoModel.from_pretrained(sys.argv[1]); "
        "print(type(m).__name__, m.encoders['audio'].num_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["MokaForConditionalGeneration", "3"], done.stderr


def test_from_backbone_keeps_the_language_model_weights(model, folder):
    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    composed = model.language_model.state_dict()
    assert composed.keys() == original.keys()
    assert all(torch.equal(composed[name], original[name]) for name in original)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size  # no token was added


def test_text_only_gives_the_backbone_logits(model, folder, processor):
    batch = processor(chat("which digit is spoken"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=batch["input_ids"]).logits
    same(logits_of(model, batch), expected, 1e-6)


# --- where media go


LAYOUTS = [
    ["image one audio", "audio two image image"],
    ["audio audio image one video", "three", "image"],
    ["video image video audio image", "image audio"],
    ["one two", "three"],
]


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_media_features_are_in_their_placeholders(model, processor, layouts, side):
    """Compared with a walk over the samples one medium at a time."""
    batch = processor([chat(text, seed=10 * i) for i, text in enumerate(layouts)], padding_side=side)
    media = {key: batch[key] for key in ("pixel_values", "input_features") if key in batch}
    with torch.no_grad():
        merged = model.merge_embeddings(batch["input_ids"], batch["mm_token_type_ids"], **media)
        for row, text in enumerate(layouts):
            wanted = []  # (type id, feature of one token) in order
            for number, word in enumerate(text.split()):
                if word not in TYPES:
                    continue
                name = "audio" if word == "audio" else "visual"
                value = medium(word, 10 * row + number)
                for one in value if isinstance(value, list) else [value]:
                    values = torch.from_numpy(processor.front_ends[name](one))[None]
                    features = model.projectors[name](model.encoders[name](values))[0]
                    wanted += [(TYPES[word], token) for token in features]
            for position, type_id in enumerate(batch["mm_token_type_ids"][row].tolist()):
                if type_id:
                    expected_type, expected = wanted.pop(0)
                    assert type_id == expected_type
                else:
                    expected = model.get_input_embeddings()(batch["input_ids"][row, position])
                same(merged[row, position], expected, 1e-5)
            assert not wanted


def test_video_frames_share_the_visual_encoder_with_their_own_type(model, processor):
    frames = medium("video", 0)
    video = processor([{"role": "user", "content": [{"type": "video", "video": frames}]}])
    images = processor([{"role": "user", "content": [{"type": "image", "image": frame} for frame in frames]}])
    assert torch.equal(video["pixel_values"], images["pixel_values"])
    assert video["mm_token_type_ids"].max() == 2
    assert (video["mm_token_type_ids"] == 2).sum() == 3 * 2
    assert torch.equal(video["mm_token_type_ids"].bool(), images["mm_token_type_ids"].bool())
    same(logits_of(model, video), logits_of(model, images), 1e-6)


@pytest.mark.parametrize("route", ["forward", "generate"])
def test_a_count_mismatch_is_refused(model, processor, route):
    batch = processor(chat("image one audio"))
    call = getattr(model, route)
    for wrong in (
        {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)},
        {"pixel_values": None},
        {"pixel_values": batch["pixel_values"][:0]},
    ):
        with pytest.raises(MokaError, match=r"visual: the text has 2 placeholder tokens"):
            call(**{**batch, **wrong})
    text = processor(chat("one"))
    with pytest.raises(MokaError, match="audio: the text has 0 placeholder tokens, and 1 media"):
        call(**text, input_features=batch["input_features"])


def test_a_type_without_encoder_is_refused(model, processor):
    batch = processor(chat("one two"))
    batch["mm_token_type_ids"][0, 3] = 4
    with pytest.raises(MokaError, match=r"no encoder serves \[4\]"):
        model(**batch)


def test_types_follow_from_the_placeholder_ids(model, asked):
    derived = {k: v for k, v in asked.items() if k not in ("mm_token_type_ids", "interaction_ids")}
    assert torch.equal(model.derive_type_ids(asked["input_ids"]), asked["mm_token_type_ids"])
    same(logits_of(model, derived), logits_of(model, asked), 1e-6)


def test_two_encoders_of_one_medium_are_refused(backbones):
    twice = {"visual": {**CONV["visual"], "type_ids": [1]}, "film": {**CONV["visual"], "type_ids": [2]}}
    with pytest.raises(MokaError, match="two encoders take the same input"):
        MokaForConditionalGeneration.from_backbone(backbones["llama"], twice)


# --- batches


@pytest.mark.parametrize("which", ["model", "adapted"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_singles(request, processor, which, side):
    model = request.getfixturevalue(which)
    chats = [chat(q, a, seed=i) for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))]
    batch = processor(chats, padding_side=side, add_generation_prompt=False)
    assert not batch["attention_mask"].all()
    together = logits_of(model, batch)
    for row, messages in enumerate(chats):
        single = logits_of(model, processor(messages, add_generation_prompt=False))[0]
        same(together[row][batch["attention_mask"][row].bool()], single)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_shifts_no_position_of_an_absolute_backbone(tmp_path, tiny_tokenizer, side):
    """Rotary positions are relative and would hide it; GPT-2 learns one embedding for each position."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": len(tiny_tokenizer)}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes, **special, initializer_range=0.2)).save_pretrained(tmp_path)
    model = build(tmp_path)
    processor = MokaProcessor.from_model(model, tiny_tokenizer)
    chats = [chat(q, seed=i) for i, q in enumerate(QUESTIONS)]
    batch = processor(chats, padding_side=side)
    together = logits_of(model, batch)
    for row, messages in enumerate(chats):
        single = processor(messages)
        same(together[row][batch["attention_mask"][row].bool()], logits_of(model, single)[0])
        if side == "left":
            assert torch.equal(generate(model, batch)[0][row], generate(model, single)[0][0])


def test_media_reach_the_logits_of_their_own_row_only(model, asked):
    changed = {**asked, "pixel_values": asked["pixel_values"].clone()}
    changed["pixel_values"][1] += 1.0  # the image of the second row
    difference = (logits_of(model, changed) - logits_of(model, asked)).abs().amax((1, 2))
    assert difference[1] > 1e-3
    assert difference[[0, 2, 3]].max() == 0


# --- generation


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_generation_is_the_same_by_every_way(request, asked, which):
    model = request.getfixturevalue(which)
    tokens, logits = generate(model, asked)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        again, other = generate(model, asked, **options)
        assert torch.equal(tokens, again), options
        same(logits, other)
    # A full recompute with the forward of training: the media given again, no cache, no prompt embeddings.
    grown = dict(asked)
    for step in range(NEW):
        same(logits_of(model, grown)[:, -1], logits[step])
        for name, value in (("input_ids", tokens[:, [step]]), ("attention_mask", 1)):
            more = torch.ones(4, 1, dtype=torch.long) * value
            grown[name] = torch.cat([grown[name], more], 1)
        for name in ("mm_token_type_ids", "interaction_ids"):
            grown[name] = torch.nn.functional.pad(grown[name], (0, 1))


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_a_left_padded_batch_generates_as_singles(request, processor, asked, which):
    model = request.getfixturevalue(which)
    tokens, logits = generate(model, asked)
    for row, question in enumerate(QUESTIONS):
        single_tokens, single = generate(model, processor(chat(question, seed=row)))
        assert torch.equal(tokens[row], single_tokens[0])
        same(logits[:, row], single[:, 0])


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_beams_agree_with_and_without_cache(request, asked, which):
    model = request.getfixturevalue(which)
    options = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False, "num_return_sequences": 2}
    scores = {"output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(**asked, **options, **scores)
    recomputed = model.generate(**asked, **options, **scores, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)
    assert cached.sequences.shape[0] == 8
    same(cached.sequences_scores, recomputed.sequences_scores)


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_a_second_turn_over_the_cache_of_the_first(request, processor, which):
    """The chat given full, or its new tokens only under a mask of the full: as without any cache."""
    model = request.getfixturevalue(which)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = processor(chat("image which digit"))
    second = processor(chat("one audio same image", seed=7))
    # The last token decoded is not in the cache yet.
    made = model.generate(**first, **options, past_key_values=DynamicCache(config=model.config))
    answer = made.sequences[:, first["input_ids"].shape[1] :]
    full = {"input_ids": torch.cat([first["input_ids"], answer, second["input_ids"]], 1)}
    for name in ("mm_token_type_ids", "interaction_ids"):
        later = second[name] + (second[name] > 0) if name == "interaction_ids" else second[name]
        full[name] = torch.cat([first[name], torch.zeros_like(answer), later], 1)
    mask = torch.ones_like(full["input_ids"])
    media = {"input_features": second["input_features"]}
    both = {**media, "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]])}
    expected = model.generate(**full, **both, attention_mask=mask, **options, output_logits=True)
    cached = made.past_key_values.get_seq_length()
    new = {name: value[:, cached:] for name, value in full.items()}
    own = {**media, "pixel_values": second["pixel_values"]}
    for inputs in ({**full, **both}, {**new, **own}):
        cache = copy.deepcopy(made.past_key_values)
        out = model.generate(**inputs, attention_mask=mask, past_key_values=cache, **options, output_logits=True)
        same(torch.stack(out.logits), torch.stack(expected.logits))


def test_chunked_prefill_without_adapter_is_equal(model, asked):
    tokens, logits = generate(model, asked)
    again, other = generate(model, asked, prefill_chunk_size=7)
    assert torch.equal(tokens, again)
    same(logits, other)


def test_chunked_prefill_with_the_question_elsewhere_is_refused(adapted, asked):
    tokens, _ = generate(adapted, asked)
    with pytest.raises(MokaError, match="prefill_chunk_size"):
        generate(adapted, asked, prefill_chunk_size=4)
    full = asked["input_ids"].shape[1]
    assert torch.equal(generate(adapted, asked, prefill_chunk_size=full)[0], tokens)


@pytest.mark.parametrize("which", ["model", "adapted"])
@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"num_beams": 2, "no_repeat_ngram_size": 1}],
    ids=lambda o: "-".join(o),
)
def test_logits_processors_see_ordinary_ids_only(request, asked, which, options):
    """Placeholders are beyond the vocabulary: as indices into the scores they would crash."""
    model = request.getfixturevalue(which)
    assert asked["input_ids"].max() >= model.config.vocab_size
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    out = model.generate(**asked, **settings, **options)
    again = model.generate(**asked, **settings, **options, use_cache=False)
    assert torch.equal(out, again)
    assert out.max() < model.config.vocab_size
    assert out.shape[1] == asked["input_ids"].shape[1] + 8
    if "no_repeat_ngram_size" in options:
        n = options["no_repeat_ngram_size"]
        for row in out[:, -8:].tolist():
            grams = [tuple(row[i : i + n]) for i in range(9 - n)]
            assert len(set(grams)) == len(grams)


def test_repetition_penalty_weighs_the_text_of_the_prompt(model, asked):
    settings = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "output_logits": True}
    out = model.generate(**asked, **settings, repetition_penalty=1.7, return_dict_in_generate=True)
    expected = out.logits[0].clone()
    ordinary = asked["input_ids"].masked_fill(asked["mm_token_type_ids"] > 0, model.config.fill_token_id)
    for row, ids in enumerate(ordinary):
        ids = ids[asked["attention_mask"][row].bool()].unique()
        expected[row, ids] = torch.where(expected[row, ids] < 0, expected[row, ids] * 1.7, expected[row, ids] / 1.7)
    same(out.scores[0], expected, 1e-6)


def test_sequences_keep_text_and_stand_in_for_media(model, asked):
    out = model.generate(**asked, max_new_tokens=2, do_sample=False)
    prompt, types = out[:, : asked["input_ids"].shape[1]], asked["mm_token_type_ids"]
    assert torch.equal(prompt[types == 0], asked["input_ids"][types == 0])
    assert prompt[types > 0].unique().tolist() == [model.config.fill_token_id]


def test_generation_stops_where_training_ends_an_answer(backbones):
    """A base model's configuration may stop at the end of a text, and its template ends answers with another token."""
    model = build(backbones["llama"])
    model.generation_config.eos_token_id = 0
    tokenizer = AutoTokenizer.from_pretrained(backbones["llama"])
    processor = MokaProcessor.from_model(model, tokenizer)
    assert model.generation_config.eos_token_id == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    batch = processor(chat("image which digit"))
    other = generate(model, batch)[0][0, 0].item()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(other)  # what this random model says first
    ending = MokaProcessor.from_model(model, tokenizer, chat_template="plain")
    assert model.generation_config.eos_token_id == [other] == [ending.end_token_id]
    assert model.generate(**batch, max_new_tokens=NEW, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 1


def test_generate_without_attention_mask_takes_all_as_text(model, processor):
    batch = processor(chat("image which digit"))
    expected = generate(model, batch)[1]
    batch.pop("attention_mask")
    same(generate(model, batch)[1], expected)


# --- training


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_loss_on_supervised_positions_equals_the_full_loss(request, taught, which):
    model = request.getfixturevalue(which)
    short = model(**taught).logits.shape[1]
    model.train()
    try:
        assert model(**taught).logits.shape[1] < short == taught["input_ids"].shape[1]
        loss, grads = loss_and_gradients(model, taught)
        model.zero_grad()
        logits = model(**{k: v for k, v in taught.items() if k != "labels"}).logits
        full = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), taught["labels"][:, 1:].reshape(-1)
        )
        full.backward()
        same(loss, full.detach(), 1e-6)
        expected = gradients(model)
        assert expected.keys() == grads.keys()
        assert len(grads) > 10
        for name, grad in grads.items():
            same(grad, expected[name], 1e-5)
        # as the Trainer gives it under accumulation
        count = (taught["labels"] != -100).sum()
        same(model(**taught, num_items_in_batch=2 * count).loss.detach(), loss / 2, 1e-6)
    finally:
        model.eval().zero_grad()


def test_evaluation_gives_the_same_loss_over_all_positions(model, taught):
    evaluated = model(**taught)
    model.train()
    same(model(**taught).loss, evaluated.loss, 1e-5)
    model.eval()
    assert evaluated.logits.shape[1] == taught["input_ids"].shape[1]


@pytest.mark.parametrize("modalities", [CONV, TOWERS], ids=["conv", "towers"])
@pytest.mark.parametrize("layout", ["which digit", "image which digit", "audio which digit"])
def test_a_batch_without_a_medium_still_touches_every_part(backbones, layout, modalities):
    model = build(backbones["qwen2"], modalities)
    processor = MokaProcessor.from_model(model, AutoTokenizer.from_pretrained(backbones["qwen2"]))
    sound = wave if modalities is TOWERS else audio
    batch = processor(chat(layout, "seven", sound=sound), add_generation_prompt=False)
    adapted = adapt(
        model,
        modules_to_save=["projectors.visual", "projectors.audio"]
        + (["encoders.visual", "encoders.audio"] if modalities is CONV else []),
    )
    without = adapted(**batch).loss.detach()  # evaluation takes no dummies
    adapted.train()
    loss, grads = loss_and_gradients(adapted, batch)
    same(loss, without, 1e-6)
    assert grads.keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    for name in ("visual", "audio"):
        of_part = [g for n, g in grads.items() if f"projectors.{name}." in n or f"encoders.{name}." in n]
        present = {"visual": "image", "audio": "audio"}[name] in layout
        assert of_part
        assert any(g.any() for g in of_part) == present


@pytest.mark.parametrize("modalities", [CONV, TOWERS], ids=["conv", "towers"])
def test_every_batch_runs_the_same_modules_in_the_same_order(backbones, modalities):
    """Or processes with other media in their batches would wait for each other: DDP, ZeRO-3 and FSDP gather in order."""
    model = build(backbones["llama"], modalities)
    processor = MokaProcessor.from_model(model, AutoTokenizer.from_pretrained(backbones["llama"]))
    adapted = adapt(model, modules_to_save=["projectors.visual", "projectors.audio"]).train()
    called = []
    for name, module in adapted.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    sound = wave if modalities is TOWERS else audio
    orders = set()
    for layout in (
        "image which digit audio",
        "which digit",
        "audio is the same",
        "digit image",
        "audio the image audio",
    ):
        called.clear()
        adapted(**processor(chat(layout, "seven", sound=sound), add_generation_prompt=False)).loss.backward()
        orders.add(tuple(called))
    assert len(orders) == 1
    assert {"encoders.visual", "encoders.audio"} <= {name.removeprefix("base_model.model.") for name in orders.pop()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("modalities", [CONV, TOWERS], ids=["conv", "towers"])
def test_gradient_checkpointing_gives_equal_gradients(backbones, reentrant, modalities):
    model = build(backbones["llama"], modalities)
    processor = MokaProcessor.from_model(model, AutoTokenizer.from_pretrained(backbones["llama"]))
    parts = ["projectors.visual", "projectors.audio"] + (["encoders.visual"] if modalities is CONV else [])
    adapted = adapt(model, modules_to_save=parts).train()
    sound = wave if modalities is TOWERS else audio
    layouts = ["image which digit audio", "which digit", "audio is the same image"]
    batches = [
        processor(chat(layout, "seven", seed, sound), add_generation_prompt=False)
        for seed, layout in enumerate(layouts)
    ]

    def run():
        adapted.zero_grad()
        sum(adapted(**batch).loss for batch in batches).backward()  # several forwards before one backward
        return gradients(adapted)

    plain = run()
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted.enable_input_require_grads()
    checkpointed = run()
    assert plain.keys() == checkpointed.keys()
    assert any(g.abs().max() > 1e-4 for n, g in plain.items() if "moka_A" in n)
    for name, grad in plain.items():
        same(checkpointed[name], grad, 1e-5)


# --- the adapter on it


@pytest.mark.parametrize("modalities", [CONV, TOWERS], ids=["conv", "towers"])
def test_only_the_language_model_is_adapted(backbones, modalities):
    model = build(backbones["llama"], modalities)
    encoder_linears = [n for n, _ in model.encoders.named_modules() if n.endswith("q_proj")]
    assert bool(encoder_linears) == (modalities is TOWERS)  # CLIP and Whisper use the backbone's names
    adapted = adapt(model, modules_to_save=["projectors.visual", "projectors.audio"])
    holders = {n.split(".moka_A")[0] for n, _ in adapted.named_parameters() if ".moka_A" in n}
    assert len(holders) == 2 * 7
    assert all(".language_model." in name for name in holders)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(".moka_" in n or ".projectors." in n for n in trained)


def test_an_adapter_folder_carries_projectors_and_encoders(backbones, asked, tmp_path):
    adapted = adapt(build(backbones["llama"]))
    with torch.no_grad():  # as if trained
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    base = MokaForConditionalGeneration.from_backbone(backbones["llama"], CONV).eval()  # its own random projectors
    processor = MokaProcessor.from_model(base, AutoTokenizer.from_pretrained(backbones["llama"]))
    batch = processor([chat(q, seed=i) for i, q in enumerate(QUESTIONS)])
    before = logits_of(base, batch)
    loaded = PeftModel.from_pretrained(base, tmp_path, adapter_name="other").eval()
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(adapted, batch), rtol=0, atol=1e-6)
    assert torch.equal(generate(loaded, batch)[0], generate(adapted, batch)[0])
    assert (logits_of(loaded, batch) - before).abs().max() > 1e-2
    with loaded.disable_adapter():
        same(logits_of(loaded, batch), before, 1e-6)


def test_training_moves_the_saved_parts_and_not_the_backbone(backbones, tmp_path):
    adapted = adapt(build(backbones["qwen2"])).train()
    processor = MokaProcessor.from_model(adapted, AutoTokenizer.from_pretrained(backbones["qwen2"]))
    batch = processor([chat(q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)], add_generation_prompt=False)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.8
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("modalities", [CONV, TOWERS], ids=["conv", "towers"])
def test_a_frozen_encoder_in_modules_to_save_is_trained_and_its_original_is_not(backbones, modalities):
    modalities = copy.deepcopy(modalities)
    modalities["visual"]["encoder"]["trainable"] = False
    adapted = adapt(build(backbones["llama"], modalities))
    processor = MokaProcessor.from_model(adapted, AutoTokenizer.from_pretrained(backbones["llama"]))
    chats = [[{"role": "user", "content": [{"type": "image", "image": image(0)}, {"type": "text", "text": "which"}]}]]
    batch = processor([[*one, {"role": "assistant", "content": "seven"}] for one in chats], add_generation_prompt=False)
    wrapper = adapted.base_model.model.encoders["visual"]
    saved, original = wrapper.modules_to_save["default"], wrapper.original_module
    adapted.train().eval()
    adapted.train()
    assert saved.training
    assert not original.training
    assert all(p.requires_grad for p in saved.parameters())
    assert not any(p.requires_grad for p in original.parameters())
    adapted(**batch).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in saved.parameters())


# --- dtypes and towers


def test_a_bfloat16_backbone_takes_float32_encoders(backbones, tmp_path):
    model = build(backbones["llama"], dtype=torch.bfloat16)
    processor = MokaProcessor.from_model(model, AutoTokenizer.from_pretrained(backbones["llama"]))
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in [*model.encoders.parameters(), *model.projectors.parameters()]} == {torch.float32}
    batch = processor([chat(q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)], add_generation_prompt=False)
    reference = logits_of(build(backbones["llama"]), batch)
    assert (logits_of(model, batch).float() - reference).abs().max() < 0.05 * reference.abs().max()

    model.save_pretrained(tmp_path)
    loaded = MokaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto").eval()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(model, batch), rtol=0, atol=0)

    adapted = adapt(model).train()
    loss, grads = loss_and_gradients(adapted, batch)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert grads.keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert adapted.eval().generate(**batch, max_new_tokens=2).max() < model.config.vocab_size


def test_clip_and_whisper_towers_end_to_end(backbones, tmp_path):
    model = build(backbones["qwen2"], TOWERS)
    processor = MokaProcessor.from_model(model, AutoTokenizer.from_pretrained(backbones["qwen2"]))
    chats = [
        [{"role": "user", "content": [{"type": "audio", "audio": wave(0)}, {"type": "text", "text": "which digit"}]}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "same"},
                    {"type": "video", "video": [image(1), image(2)]},
                    {"type": "audio", "audio": wave(1)},
                ],
            }
        ],
    ]
    batch = processor(chats)
    assert (batch["mm_token_type_ids"] == 2).sum() == 2 * 3
    assert (batch["mm_token_type_ids"] == 3).sum() == 2 * 2
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    loaded = MokaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    again = MokaProcessor.from_pretrained(tmp_path / "processor")(chats)
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    torch.testing.assert_close(logits_of(loaded, again), logits_of(model, batch), rtol=0, atol=0)
    adapted = adapt(model, modules_to_save=["projectors.visual", "projectors.audio"])
    tokens, logits = generate(adapted, batch)
    recomputed = generate(adapted, batch, use_cache=False)
    assert torch.equal(tokens, recomputed[0])
    same(logits, recomputed[1])
    for row in range(2):
        same(logits[:, row], generate(adapted, processor(chats[row]))[1][:, 0])
