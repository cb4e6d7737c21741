"""The processor: which tokens are taught, which belong to which medium and question, under every kind of template."""

import copy
import json
import shutil
from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from moka import MokaError, MokaForConditionalGeneration, MokaProcessor
from moka.modeling import TooLongError, build_encoder
from moka.modeling.encoders import build_front_end
from moka.modeling.media import AudioFeatures, Waveform

VISUAL = {"encoder": {"type": "conv-image", "image_size": 8, "num_tokens": 2}, "type_ids": [1, 2], "tokens": 2}
AUDIO = {"encoder": {"type": "conv-audio", "frames": 8, "num_tokens": 3}, "type_ids": [3], "tokens": 3}
PICTURE = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
SOUND = AudioFeatures(np.ones((5, 13), np.float32), "mfcc")
WAVE = Waveform(np.sin(np.arange(4000) / 5).astype(np.float32), 16000)
IGNORE = -100

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No special token after an answer, and no generation prompt.
BARE = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
# A special token opens the next message, and none closes an answer.
OPENING = "{% for m in messages %}{{ bos_token + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
# What is before an answer is longer than the generation prompt, as in models that think.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "own": None,
    "chatml": "chatml",
    "plain": "plain",
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "bare": BARE,
    "ended": "bare",
    "opening": OPENING,
    "thinking": THINKING,
}


def image():
    return {"type": "image", "image": PICTURE}


def audio():
    return {"type": "audio", "audio": SOUND}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": [text(p) if isinstance(p, str) else p for p in parts]}


def answer(words):
    return {"role": "assistant", "content": words}


CHAT = [
    {"role": "system", "content": "be short"},
    user("one", image(), "which digit"),
    answer("seven"),
    user(audio(), "and now?"),
    answer("no, eight"),
]
SINGLE = [user(image(), "which digit"), answer("seven")]


def sentencepiece_like():
    """Words begin with a visible space, spaces are no tokens of their own, unknown characters are bytes: LLaMA-2's way."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    # Words merged with what is around them, so that where a text is cut changes its tokens.
    words = "[INST] which digit [/INST] seven and now? user: assistant: Answer: be short one eight system"
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(words.split() * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary entries of the vocabulary
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)


@pytest.fixture(scope="module")
def llama3_tokenizer(tiny_tokenizer):
    """Its header and end-of-turn tokens are special, but only the end of a text is named."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str()),
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        chat_template=LLAMA3,
    )
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer, llama3_tokenizer):
    return {"bytes": tiny_tokenizer, "pieces": sentencepiece_like(), "headers": llama3_tokenizer}


def build(tokenizer, modalities=None, **kwargs):
    return MokaProcessor(tokenizer, modalities or {"visual": VISUAL, "audio": AUDIO}, len(tokenizer), **kwargs)


@pytest.fixture(scope="module")
def processor(tiny_tokenizer):
    return build(tiny_tokenizer, chat_template="chatml")


def with_tokens(tokenizer, *tokens, **names):
    """A copy of ``tokenizer`` with more tokens; ``names``: ``pad_token`` and the like."""
    wider = copy.deepcopy(tokenizer)
    wider.add_tokens(list(tokens))
    for name, token in names.items():
        setattr(wider, name, token)
    return wider


PAD, IMAGE_TOKEN, WORD = AddedToken("<pad>", special=True), AddedToken("<img>", special=True), AddedToken("word")
OTHER = {"type_ids": [7], "encoder": AUDIO["encoder"], "tokens": 3}


@pytest.mark.parametrize(
    ("tokens", "names", "modalities", "named"),
    [
        ([PAD], {"pad_token": "<pad>"}, {}, ["pad_token", "'<pad>'", "image"]),
        ([IMAGE_TOKEN, PAD], {"pad_token": "<pad>"}, {}, ["pad_token", "'<pad>'", "video"]),
        ([PAD], {"eos_token": "<pad>"}, {}, ["eos_token", "'<pad>'", "image"]),
        ([WORD], {}, {}, ["'word'", "image"]),
        ([PAD], {"pad_token": "<pad>"}, {"modalities": {"other": OTHER}}, ["pad_token", "'<pad>'"]),
    ],
)
def test_a_token_beyond_the_vocabulary_of_the_model_is_refused(tiny_tokenizer, tokens, names, modalities, named):
    """Its id would be that of a medium's placeholder, or no row of the embedding table."""
    tokenizer = with_tokens(tiny_tokenizer, *tokens, **names)
    settings = {"modalities": {"visual": VISUAL, "audio": AUDIO}, **modalities}
    size = len(tiny_tokenizer)
    with pytest.raises(MokaError) as error:
        MokaProcessor(tokenizer, vocab_size=size, **settings)
    for word in (*named, str(len(tokenizer) - 1), str(size), "resize_token_embeddings"):
        assert word in str(error.value)
    MokaProcessor(tokenizer, vocab_size=len(tokenizer), **settings)


def test_a_special_token_beyond_the_vocabulary_that_no_text_becomes_is_allowed(tiny_tokenizer):
    """The text-only Gemma 3 has such a tokenizer: its mark of a picture has the first id after the vocabulary."""
    tokenizer = with_tokens(tiny_tokenizer, IMAGE_TOKEN)
    size = len(tiny_tokenizer)
    processor = MokaProcessor(tokenizer, {"visual": VISUAL}, size)
    encoded = processor.encode([user("is <img> a word?", image()), answer("no")])
    beyond = [t for i, t in zip(encoded["input_ids"], encoded["mm_token_type_ids"], strict=True) if i >= size]
    assert beyond == [1, 1]
    template = "{% for m in messages %}{{ '<img>' + m['content'] }}{% endfor %}"
    processor = MokaProcessor(tokenizer, {"visual": VISUAL}, size, chat_template=template)
    with pytest.raises(MokaError, match=f"chat_template.*'<img>'.*{size}"):
        processor.encode(SINGLE)


def test_a_processor_and_a_model_of_other_vocabularies_are_refused(tiny_tokenizer, backbones):
    modalities = {"visual": {"encoder": VISUAL["encoder"], "projector": {"type": "linear"}}}
    model = MokaForConditionalGeneration.from_backbone(backbones["llama"], modalities)
    size = model.config.vocab_size
    MokaProcessor(tiny_tokenizer, {"visual": VISUAL}, size).teach_end(model)
    other = MokaProcessor(tiny_tokenizer, {"visual": VISUAL}, size + 8)
    with pytest.raises(MokaError, match=rf"vocab_size.*{size + 8}.*{size}"):
        other.teach_end(model)


def runs(processor, encoded):
    """[(text, or medium tokens, taught, interaction id)] of maximal runs."""
    rows = zip(
        encoded["input_ids"],
        encoded["labels"],
        encoded["mm_token_type_ids"],
        encoded["interaction_ids"],
        strict=True,
    )
    shown = []
    for (taught, type_id, group), tokens in groupby(rows, key=lambda r: (r[1] != IGNORE, r[2], r[3])):
        ids = [token[0] for token in tokens]
        if type_id:
            assert set(ids) == {processor.vocab_size + type_id - 1}
        what = (
            f"{ {1: 'image', 2: 'video', 3: 'audio'}[type_id] } {len(ids)}"
            if type_id
            else processor.tokenizer.decode(ids)
        )
        shown.append((what, taught, group))
    return shown


def taught_runs(encoded):
    """Start and ids of each maximal run of supervised tokens."""
    found = []
    labels = encoded["labels"]
    for index, label in enumerate(labels):
        if label != IGNORE:
            if index == 0 or labels[index - 1] == IGNORE:
                found.append((index, []))
            found[-1][1].append(label)
    return found


# --- the mask and the ids


def test_one_turn(processor):
    encoded = processor.encode(SINGLE)
    assert runs(processor, encoded) == [
        ("<|im_start|>user\n", False, 0),
        ("image 2", False, 1),
        ("which digit", False, 1),
        ("<|im_end|>\n<|im_start|>assistant\n", False, 0),
        ("seven<|im_end|>", True, 0),
        ("\n", False, 0),
    ]
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])
    assert encoded["pixel_values"].shape == (1, 1, 8, 8)
    assert "input_features" not in encoded
    labels = [label for label in encoded["labels"] if label != IGNORE]
    assert labels == [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != IGNORE]


def several(first, second):
    return [
        ("<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n", False, 0),
        ("one", False, 1),
        ("image 2", False, 1),
        ("which digit", False, 1),
        ("<|im_end|>\n<|im_start|>assistant\n", False, 0),
        ("seven<|im_end|>", True, 0),
        ("\n<|im_start|>user\n", False, 0),
        ("audio 3", False, first),
        *(
            [("and now?", False, second), ("<|im_end|>\n<|im_start|>assistant\n", False, 0)]
            if second
            else [("and now?<|im_end|>\n<|im_start|>assistant\n", False, 0)]
        ),
        ("no, eight<|im_end|>", True, 0),
        ("\n", False, 0),
    ]


def test_own_turn_each_medium_belongs_to_its_question(processor):
    assert runs(processor, processor.encode(CHAT)) == several(2, 2)


def test_first_turn_all_media_belong_to_the_first_question(tiny_tokenizer):
    processor = build(tiny_tokenizer, chat_template="chatml", interaction="first_turn")
    assert runs(processor, processor.encode(CHAT)) == several(1, 0)


def test_media_between_texts_and_two_user_messages_in_a_row(processor):
    encoded = processor.encode([user("one", image(), "two", audio()), user(image(), "three"), answer("yes")])
    assert runs(processor, encoded)[1:9] == [
        ("one", False, 1),
        ("image 2", False, 1),
        ("two", False, 1),
        ("audio 3", False, 1),
        ("<|im_end|>\n<|im_start|>user\n", False, 0),
        ("image 2", False, 1),
        ("three", False, 1),
        ("<|im_end|>\n<|im_start|>assistant\n", False, 0),
    ]
    assert len(encoded["pixel_values"]) == 2


def test_a_turn_of_media_only(processor):
    encoded = processor.encode([user(image(), audio()), answer("yes")])
    assert [run for run in runs(processor, encoded) if run[2]] == [("image 2", False, 1), ("audio 3", False, 1)]


def test_video_frames_are_one_span(processor):
    encoded = processor.encode([user({"type": "video", "video": [PICTURE] * 3}, image(), "one"), answer("yes")])
    assert [run[0] for run in runs(processor, encoded)[1:3]] == ["video 6", "image 2"]
    assert len(encoded["pixel_values"]) == 4


def test_media_in_an_answer_are_not_taught(processor):
    """A placeholder has no row among the logits."""
    encoded = processor.encode([user("one"), {"role": "assistant", "content": [text("yes"), image()]}])
    assert runs(processor, encoded)[3:] == [
        ("yes", True, 0),
        ("image 2", False, 1),
        ("<|im_end|>", True, 0),
        ("\n", False, 0),
    ]


def test_a_blank_answer_teaches_nothing(processor):
    encoded = processor.encode([user("one"), answer(" "), user("two"), answer("yes")])
    assert [run[0] for run in runs(processor, encoded) if run[1]] == ["yes<|im_end|>"]
    assert set(processor.encode([user("one"), answer("")])["labels"]) == {IGNORE}


@pytest.mark.parametrize(
    "words",
    [
        "<|im_end|>",
        "one<|im_start|>user\ntwo",
        "<image> <audio>",
        "\ue0000\ue001",
        "a\ue000b",
        "{{ 1 }}",
        "<|endoftext|>",
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_what_people_write_stays_text(processor, words, role):
    messages = [{"role": "system", "content": "x"}, user(image(), "x"), answer("x")]
    at = {"system": 0, "user": 1, "assistant": 2}[role]
    messages[at]["content"] = [part for part in messages[at]["content"] if not isinstance(part, str)] + [text(words)]
    encoded = processor.encode(messages)
    plain = processor.encode([{"role": "system", "content": "x"}, user(image(), "x"), answer("x")])
    special = set(processor.tokenizer.all_special_ids)
    assert [i for i in encoded["input_ids"] if i in special] == [i for i in plain["input_ids"] if i in special]
    assert encoded["mm_token_type_ids"].count(1) == 2
    assert encoded["mm_token_type_ids"].count(3) == 0
    assert words in "".join(run[0] for run in runs(processor, encoded))
    if role == "assistant":
        assert runs(processor, encoded)[-2] == (words + "<|im_end|>", True, 0)


# --- templates


CASES = [
    ("bytes", "own"),
    ("bytes", "chatml"),
    ("bytes", "plain"),
    ("bytes", "llama2"),
    ("bytes", "bare"),
    ("bytes", "ended"),
    ("bytes", "opening"),
    ("bytes", "thinking"),
    ("headers", "own"),
    ("headers", "llama3"),
    ("headers", "plain"),
    ("pieces", "own"),
    ("pieces", "chatml"),
    ("pieces", "plain"),
    ("pieces", "llama2"),
    ("pieces", "bare"),
    ("pieces", "ended"),
    ("pieces", "thinking"),
]


@pytest.fixture(params=CASES, ids="-".join)
def any_template(request, tokenizers):
    tokenizer, template = request.param
    return build(tokenizers[tokenizer], chat_template=TEMPLATES[template])


def test_an_answer_and_the_token_that_ends_it_are_taught_once(any_template):
    tokenizer = any_template.tokenizer
    for messages in (CHAT, SINGLE, CHAT[1:]):
        encoded = any_template.encode(messages)
        found = taught_runs(encoded)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert len(found) == len(answers)
        ends = {ids[-1] for _, ids in found}
        assert len(ends) == 1  # the same in the middle and at the end
        end = ends.pop()
        template = any_template.chat_template or tokenizer.chat_template
        assert end == (tokenizer.convert_tokens_to_ids("<|eot_id|>") if template == LLAMA3 else tokenizer.eos_token_id)
        assert end == any_template.end_token_id
        for (_, ids), words in zip(found, answers, strict=True):
            assert ids.count(end) == 1
            assert any_template.decode(ids) == words


def test_training_equals_inference(any_template):
    """The prompt of inference is all that is before the answer in training, token for token."""
    for messages in (CHAT, SINGLE, CHAT[1:]):
        full = any_template.encode(messages)
        starts = [start for start, _ in taught_runs(full)]
        asked = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        assert len(starts) == len(asked)
        for start, index in zip(starts, asked, strict=True):
            prompt = any_template.encode(messages[:index], add_generation_prompt=True)
            for name in ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask"):
                assert prompt[name] == full[name][:start], (name, any_template.tokenizer.decode(prompt["input_ids"]))


def test_texts_survive_any_tokenizer(any_template):
    shown = [run[0] for run in runs(any_template, any_template.encode(CHAT))]
    for words in ("which digit", "and now?", "be short"):
        assert any(words in run for run in shown), shown


def test_llama2_refuses_two_user_messages_in_a_row(tokenizers):
    processor = build(tokenizers["pieces"], chat_template=LLAMA2)
    with pytest.raises(MokaError, match="roles must alternate"):
        processor.encode([user("one"), user("two"), answer("yes")])


def test_a_tokenizer_without_an_end_is_refused(tiny_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(MokaError, match="eos_token"):
        build(bare)


# --- batches


def test_a_batch_is_padded_left_or_right(processor):
    chats = [SINGLE, CHAT, [user("one")]]
    encoded = [processor.encode(c) for c in chats]
    longest = len(encoded[1]["input_ids"])
    fill = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORE}
    for side in ("left", "right"):
        batch = processor(chats, add_generation_prompt=False, padding_side=side)
        for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids", "interaction_ids"):
            assert batch[name].shape == (3, longest)
            for row, one in zip(batch[name].tolist(), encoded, strict=True):
                pad = [fill.get(name, 0)] * (longest - len(one[name]))
                assert row == (pad + one[name] if side == "left" else one[name] + pad)
        assert batch["pixel_values"].shape == (2, 1, 8, 8)
        assert batch["input_features"].shape == (1, 14, 8)


def test_a_batch_of_one_is_the_single(processor):
    one, many = processor(CHAT), processor([CHAT])
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_media_are_stacked_in_order_of_appearance(processor):
    other = Image.new("L", (8, 8), 200)
    batch = processor([[user(image(), {"type": "image", "image": other})], [user({"type": "image", "image": other})]])
    expected = [processor.front_ends["visual"](p) for p in (PICTURE, other, other)]
    assert np.array_equal(batch["pixel_values"].numpy(), np.stack(expected))


def test_decode_gives_back_the_answer(processor):
    ids = processor.tokenizer("seven<|im_end|>\n")["input_ids"]
    assert processor.decode(ids) == "seven"
    assert processor.batch_decode(torch.tensor([ids, ids])) == ["seven", "seven"]


# --- length


LONG = [user("one two three four five", image(), "which digit is spoken"), answer("seven eight nine zero one two")]


def test_too_long_is_reported_with_its_sizes(processor):
    total = len(processor.encode(LONG)["input_ids"])
    question = sum(len(processor.tokenizer(p["text"])["input_ids"]) for p in LONG[0]["content"] if p["type"] == "text")
    assert len(processor.encode(LONG, max_length=total)["input_ids"]) == total
    with pytest.raises(TooLongError, match=rf"{total} tokens \(question: {question}\), the context {total - 1}"):
        processor.encode(LONG, max_length=total - 1)
    with pytest.raises(TooLongError):
        processor(LONG, add_generation_prompt=False, max_length=total - 1)


def test_text_is_shortened_and_media_never(processor):
    total = len(processor.encode(LONG)["input_ids"])
    smallest = None
    for room in range(total, 0, -1):
        try:
            encoded = processor.encode(LONG, max_length=room, truncate=True)
        except TooLongError as error:
            smallest = room + 1
            assert "media spans are never cut" in str(error)  # noqa: PT017
            break
        shown = runs(processor, encoded)
        assert len(encoded["input_ids"]) == room
        assert ("image 2", False, 1) in shown
        assert shown[0][0] == "<|im_start|>user\n"
        asked = [run[0] for run in shown if run[2] and not run[0].startswith("image")]
        assert len(asked) == 2
        assert "one two three four five".startswith(asked[0])
        assert "which digit is spoken".startswith(asked[1])
        (taught,) = [run[0] for run in shown if run[1]]
        assert taught.endswith("<|im_end|>")
        assert "seven eight nine zero one two".startswith(taught.removesuffix("<|im_end|>"))
        if asked[1] != "which digit is spoken":  # the answer goes first
            assert len(taught_runs(encoded)[0][1]) == 2
    # scaffold, the image, and a token of each text
    least = processor.encode([user("o", image(), "w"), answer("s")])
    assert smallest == len(least["input_ids"])


def test_a_shortened_answer_keeps_the_token_that_ends_it(tokenizers):
    """Also where the template ends it with a space before that token."""
    processor = build(tokenizers["bytes"], chat_template=LLAMA2)
    full = processor.encode(LONG)
    ((_, expected),) = taught_runs(full)
    assert processor.tokenizer.decode(expected[-2:]) == " <|im_end|>"
    for cut in (1, 3, len(expected) - 3):
        encoded = processor.encode(LONG, max_length=len(full["input_ids"]) - cut, truncate=True)
        assert [ids for _, ids in taught_runs(encoded)] == [expected[: -2 - cut] + expected[-2:]]


def test_a_question_that_would_vanish_is_reported(processor):
    asked = [user(image(), "which digit")]
    room = len(processor.encode([user(image())], add_generation_prompt=True)["input_ids"])
    with pytest.raises(TooLongError, match="nothing would be left of the question"):
        processor.encode(asked, add_generation_prompt=True, max_length=room, truncate=True)
    kept = processor.encode(asked, add_generation_prompt=True, max_length=room + 1, truncate=True)
    assert len(kept["input_ids"]) == room + 1


def test_the_cache_of_scaffolds_is_not_shortened(processor):
    before = processor.encode(LONG)
    with pytest.raises(TooLongError):
        processor.encode(LONG, max_length=3, truncate=True)
    processor.encode(LONG, max_length=len(before["input_ids"]) - 4, truncate=True)
    assert processor.encode(LONG)["input_ids"] == before["input_ids"]


# --- saving


def equal_inputs(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("template", [None, "plain", LLAMA2])
@pytest.mark.parametrize("interaction", ["own_turn", "first_turn"])
def test_a_saved_processor_is_the_same(tiny_tokenizer, tmp_path, template, interaction):
    processor = build(tiny_tokenizer, chat_template=template, interaction=interaction)
    processor.save_pretrained(tmp_path / "new" / "folder")
    loaded = MokaProcessor.from_pretrained(tmp_path / "new" / "folder")
    for messages in (CHAT, SINGLE):
        assert equal_inputs(processor.encode(messages), loaded.encode(messages))
    overridden = MokaProcessor.from_pretrained(tmp_path / "new" / "folder", chat_template="chatml")
    assert overridden.encode(SINGLE)["input_ids"] != processor.encode(SINGLE)["input_ids"]


@pytest.mark.parametrize("name", ["pieces", "headers"])
def test_a_saved_processor_keeps_its_tokenizer(tokenizers, tmp_path, name):
    processor = build(tokenizers[name])
    processor.save_pretrained(tmp_path)
    assert equal_inputs(processor.encode(CHAT), MokaProcessor.from_pretrained(tmp_path).encode(CHAT))


def test_published_front_ends_are_saved_full(tiny_tokenizer, tmp_path):
    """The encoder's folder is gone, as the hub is on a machine without network: its own pixel mean must not be lost."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    settings = {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **settings})
    )
    clip = build_encoder({"type": "clip", "name_or_path": str(tmp_path / "clip")})
    whisper = {"type": "whisper", "model_config": {"d_model": 16, "encoder_attention_heads": 2, "encoder_layers": 1,
                                                   "max_source_positions": 10}}  # fmt: skip
    modalities = {
        "visual": {"encoder": clip.to_dict(), "type_ids": [1, 2], "tokens": 4},
        "audio": {"encoder": build_encoder(whisper).to_dict(), "type_ids": [3], "tokens": 10},
    }
    processor = build(tiny_tokenizer, modalities)
    chat = [user(image(), {"type": "audio", "audio": WAVE}, "same"), answer("yes")]
    expected = processor.encode(chat)
    processor.save_pretrained(tmp_path / "processor")
    shutil.rmtree(tmp_path / "clip")
    loaded = MokaProcessor.from_pretrained(tmp_path / "processor")
    assert equal_inputs(loaded.encode(chat), expected)
    guessed = build_front_end(clip.to_dict())(PICTURE)
    assert not np.allclose(expected["pixel_values"][0], guessed)
    loaded.save_pretrained(tmp_path / "again")
    assert equal_inputs(MokaProcessor.from_pretrained(tmp_path / "again").encode(chat), expected)


def test_a_folder_without_processor_is_named(tmp_path):
    with pytest.raises(MokaError, match=r"moka_processor\.json"):
        MokaProcessor.from_pretrained(tmp_path)


# --- bad input


def test_bad_input_is_named(processor, tiny_tokenizer):
    with pytest.raises(MokaError, match="given no chat"):
        processor([])
    with pytest.raises(MokaError, match="no messages"):
        processor([[]])
    with pytest.raises(MokaError, match="'every_turn' is not one of own_turn, first_turn"):
        build(tiny_tokenizer, interaction="every_turn")
    with pytest.raises(MokaError, match="Unknown content part 'picture'"):
        processor([user({"type": "picture", "picture": PICTURE})])
    with pytest.raises(MokaError, match="has no 'image'"):
        processor([user({"type": "image"})])
    with pytest.raises(MokaError, match=r"got the path 'x\.png'"):
        processor([user({"type": "image", "image": "x.png"})])


def test_a_medium_of_the_wrong_kind_or_without_encoder_is_named(processor, tiny_tokenizer):
    with pytest.raises(MokaError, match=r"given a recording.*takes images"):
        processor([user({"type": "image", "image": WAVE})])
    with pytest.raises(MokaError, match="given an image, but this encoder takes recordings"):
        processor([user({"type": "audio", "audio": PICTURE})])
    seeing = build(tiny_tokenizer, {"visual": VISUAL})
    with pytest.raises(MokaError, match="no encoder for audio; its modalities: visual"):
        seeing([user(audio(), "one")])
    stills = build(tiny_tokenizer, {"visual": {**VISUAL, "type_ids": [1]}})
    with pytest.raises(MokaError, match="no encoder for video"):
        stills([user({"type": "video", "video": [PICTURE]})])
