"""Whose turn a token belongs to: markers from real chat templates, and the groups that follow from them."""

import json
import time
from functools import cache
from itertools import chain

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import moka
from moka.adapter.turns import (
    groups_from_labels,
    groups_from_prompt,
    question_groups,
    segments,
    turn_markers,
)
from moka.errors import MokaError

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{% if part.type == 'image' %}"
    "{{ '<img>' }}{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content"
    " + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set messages = messages[1:] %}{% else %}"
    "{{ 'A chat between a curious user and an assistant. ' }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA = (  # no end of an answer at all, and the first turn begins the text
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<img>\n' }}{% else %}{{ part.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS = (
    "{% for m in messages %}{{ m.role.capitalize() + ': ' }}{% for part in m.content %}{% if part.type == 'image' %}{{ '<img>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == "
    "'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') + m.content | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATES = {  # template, its special tokens
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "chatml, parts": (CHATML_PARTS, ["<|im_start|>", "<|im_end|>"]),
    "chatml as plain text": (CHATML, []),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "llama2": (LLAMA2, []),
    "mistral": (MISTRAL, []),
    "mistral v3": (MISTRAL, ["[INST]", "[/INST]"]),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "vicuna": (VICUNA, []),
    "llava": (LLAVA, []),
    "idefics": (IDEFICS, ["<end_of_utterance>"]),
    "deepseek": (DEEPSEEK, []),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "phi3": (PHI3, [*ROLES, "<|end|>"]),
    "phi4": (PHI4, [*ROLES, "<|end|>"]),
    "glm": (GLM, ["[gMASK]", "<sop>", *ROLES]),
}
CORPUS = [
    "USER: What is it?\n\nASSISTANT: It is a cat. User: Who?\n\nAssistant: No one. [INST] x [/INST] y [INST] <<SYS>> <</SYS>>",
    "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n\nThis.\n\n<|im_end|>\n system user model A chat :\n\n ?\n\n",
    "the cat sat on the tree:\n\nyes. no?\n what where when who  how   much ASSISTANT:\n\n USER:\n\n",
] * 5
GPT4 = r"\p{L}+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def tokenizer_for(template, kind):
    """A small trained tokenizer of one kind that has the template and its special tokens."""
    text, special = TEMPLATES[template]
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        alphabet = list("▁" + "".join(map(chr, range(33, 127))))
    else:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        split = [pre_tokenizers.Split(Regex(GPT4), "isolated")] if kind == "gpt4" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [line for text in CORPUS for line in text.split("\n")] if kind == "metaspace" else CORPUS,
        trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False
        ),
    )
    if (
        kind == "metaspace"
    ):  # as sentencepiece: no token goes over a word, but spaces and punctuation merge across words
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        learned = json.loads(tokenizer.to_str())["model"]
        vocab = learned["vocab"] | {f"<0x{i:02X}>": len(learned["vocab"]) + i for i in range(256)}
        tokenizer.model = models.BPE(vocab, [tuple(pair) for pair in learned["merges"]], byte_fallback=True)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ["<img>", *special]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=text
    )


ALL = pytest.mark.parametrize(
    ("template", "kind"), [(name, kind) for name in TEMPLATES for kind in ("gpt2", "gpt4", "metaspace")]
)
IMG, SOI = 9000, 9001  # placeholder ids, put into the ids by hand, and a structure token before each


def build(template, kind, chat, prompt=False):
    """Tokenise a chat of (role, text) whose users' texts may hold one "<img>": arrays with the expectation by role.

    Returns ids, media, keys_allowed, labels, roles: [1, seq], where roles is true for each token the index of the message
    in whose content it is, else -1.
    """
    tokenizer = tokenizer_for(template, kind)
    parts = "part" in TEMPLATES[template][0]
    messages = [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in chat]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    placeholder = tokenizer.convert_tokens_to_ids("<img>")
    spans, cursor = [], 0
    for _, content in chat:
        begin = text.index(content.strip(), cursor)
        cursor = begin + len(content.strip())
        spans.append((begin, cursor))
    rows = []
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # A token that a content shares with the template's text belongs to the content if it ends in it.
        role = next((i for i, (begin, end) in enumerate(spans) if begin < stop <= end or begin <= start < end), -1)
        answer = role >= 0 and chat[role][0] == "assistant"
        if token == placeholder:
            rows += [(SOI, False, False, -100, role), (IMG, True, False, -100, role), (IMG, True, False, -100, role)]
        else:
            rows.append((token, False, True, token if answer else -100, role))
    return tuple(np.array([column]) for column in zip(*rows, strict=True))


def expected(chat, media, keys, roles):
    """Groups by hand: a user's content is its turn's; media of a system turn are the first turn's."""
    turns = {i: sum(role == "user" for role, _ in chat[: i + 1]) for i in range(len(chat))}
    groups = [
        max(1, turns[role]) if role >= 0 and (medium or (key and chat[role][0] == "user")) else 0
        for medium, key, role in zip(media[0], keys[0], roles[0], strict=True)
    ]
    return np.array([groups])


CHATS = {
    "one turn": [("user", "<img>what is it")],
    "two turns": [
        ("user", "<img>what is it?"),
        ("assistant", "a cat."),
        ("user", "and <img>this"),
        ("assistant", "a dog"),
    ],
    "no medium at first": [("user", "hello"), ("assistant", "yes?"), ("user", "<img>who: 12 [b]"), ("assistant", "no")],
    "medium in an answer": [("user", "what"), ("assistant", "this: <img>here"), ("user", "why"), ("assistant", "so")],
}


EXACT = ("chatml", "qwen3", "llama3", "gemma", "phi3", "phi4", "glm")


@ALL
def test_a_template_yields_markers_that_locate_the_turns_of_conversations(template, kind):
    markers = turn_markers(tokenizer_for(template, kind))
    for name, chat in CHATS.items():
        ids, media, keys, _, roles = build(template, kind, chat, prompt=chat[-1][0] == "user")
        groups, found = question_groups(ids, media, keys, np.zeros_like(ids), markers)
        want = expected(chat, media, keys, roles)
        # A space of the template next to the content may be a token of its own: "USER: x ". No scaffold else is a key.
        outside = (want == 0) & (groups > 0)
        stray = tokenizer_for(template, kind).convert_ids_to_tokens(ids[outside].tolist())
        assert found, name
        assert not (template in EXACT and stray and kind != "gpt2"), (name, stray)
        if (template, kind) != ("chatml as plain text", "metaspace"):  # there "?<|im_" is a token
            assert set(stray) <= {"Ġ", "▁", "Ċ", "ĊĊ", "<0x0A>"}, name
        np.testing.assert_array_equal(groups[~outside], want[~outside], err_msg=name)


@pytest.mark.parametrize("template", ["chatml", "llama3", "phi3", "phi4", "glm", "idefics", "deepseek", "llava"])
def test_a_system_turn_has_no_keys_and_its_image_belongs_to_the_first_user_turn(template):
    chat = [("system", "be <img>kind"), *CHATS["two turns"]]
    ids, media, keys, _, roles = build(template, "gpt4", chat)
    groups, _ = question_groups(ids, media, keys, np.zeros_like(ids), turn_markers(tokenizer_for(template, "gpt4")))
    assert (groups[(roles == 0) & media] == 1).all()
    assert (groups[(roles == 0) & ~media] == 0).all()
    assert set(groups[media]) == {1, 2}


def test_an_image_before_an_answer_that_opens_the_chat_does_not_read_the_question_after_it():
    chat = [("system", "<img>be kind"), ("assistant", "hello"), ("user", "<img>what"), ("assistant", "that")]
    ids, media, keys, _, roles = build("chatml", "gpt4", chat)
    groups, _ = question_groups(ids, media, keys, np.zeros_like(ids), turn_markers(tokenizer_for("chatml", "gpt4")))
    assert set(groups[media & (roles == 0)]) == {0}
    assert set(groups[media & (roles == 2)]) == {1}


def test_the_end_of_the_turn_before_is_no_part_of_a_users_marker():
    tokenizer = tokenizer_for("chatml", "gpt4")
    markers = {key: tokenizer.convert_ids_to_tokens(ids) for key, ids in turn_markers(tokenizer).items()}
    assert markers["user"] == ["<|im_start|>", "user", "Ċ"]
    assert markers["assistant"] == ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]
    assert markers["end"] == ["<|im_end|>"]
    qwen3 = turn_markers(tokenizer_for("qwen3", "gpt4"))
    assert tokenizer_for("qwen3", "gpt4").convert_ids_to_tokens(qwen3["assistant"])[-1] == "Ċ"  # not "<think>"
    assert "end" not in turn_markers(tokenizer_for("glm", "gpt4"))


def test_a_template_that_opens_no_answer_on_request_has_the_same_markers():
    tokenizer = tokenizer_for("chatml", "gpt4")
    without = CHATML.replace("{% if add_generation_prompt %}", "{% if false %}")
    silent = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>", chat_template=without
    )
    assert turn_markers(silent) == turn_markers(tokenizer)


def test_a_marker_does_not_reach_over_two_samples():
    ids = np.array([[7, 8, 5, 5, 7, 8, 5, 5]])
    media, keys = np.arange(8)[None] == 6, np.arange(8)[None] != 6
    markers = {"user": [7, 8], "assistant": [9]}
    full, _ = question_groups(ids, media, keys, np.zeros_like(ids), markers)
    split, _ = question_groups(ids, media, keys, np.array([[0] * 5 + [1] * 3]), markers)
    assert full.tolist() == [[0, 0, 1, 1, 0, 0, 2, 2]]
    assert split.tolist() == [[0, 0, 1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    "question", ["\n\nwhat is it", "what is it?\n", '"what" is it?', "  what\n\n\n", "what is it? "]
)
@pytest.mark.parametrize("template", ["chatml", "deepseek", "vicuna", "phi3", "glm", "llama2", "mistral"])
def test_contents_that_merge_with_the_template_leave_the_turns_where_they_are(template, question):
    tokenizer = tokenizer_for(template, "gpt4")
    ids, media, keys, _, roles = build(
        template,
        "gpt4",
        [("user", "why"), ("assistant", "\n\nso it is.\n"), ("user", question), ("assistant", "\n\nno")],
    )
    groups, _ = question_groups(ids, media, keys, np.zeros_like(ids), turn_markers(tokenizer))
    assert (groups[(roles % 2 == 1) & (roles >= 0)] == 0).all()
    assert "what" in tokenizer.decode(ids[groups == 2])
    assert groups.max() == 2


def test_processors_yield_the_markers_of_what_they_write(tiny_tokenizer):
    from transformers import ProcessorMixin

    from moka.modeling.processing import MokaProcessor

    class PlainProcessor(ProcessorMixin):
        attributes = ["tokenizer"]
        tokenizer_class = "PreTrainedTokenizerFast"

    ours = MokaProcessor(tiny_tokenizer, {}, len(tiny_tokenizer))
    markers = turn_markers(ours)
    assert markers == turn_markers(tiny_tokenizer)
    chat = [("user", "which?"), ("assistant", "one"), ("user", "two three"), ("assistant", "no")]
    encoded = ours.encode([{"role": role, "content": text} for role, text in chat])
    ids = np.array([encoded["input_ids"]])
    keys = np.ones(ids.shape, bool)
    groups, _ = question_groups(ids, ~keys, keys, np.zeros_like(ids), markers)
    assert groups[0].tolist() == encoded["interaction_ids"]
    tokenizer = tokenizer_for("chatml, parts", "gpt4")
    processor = PlainProcessor(tokenizer, chat_template=tokenizer.chat_template)
    assert turn_markers(processor) == turn_markers(tokenizer)
    without = PlainProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
    with pytest.raises(MokaError, match=r"PlainProcessor.*chat_template") as error:
        turn_markers(without)
    assert "interaction_ids" in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
        "{% for m in messages %}{{ ': ' + m.content }}{% endfor %}",
        "{{ 'USER: ' + messages[-1].content }}",
        "{{ raise_exception('only one turn') }}",
    ],
)
def test_a_template_whose_turns_cannot_be_reported_apart_is_refused(template):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_for("llava", "gpt4").backend_tokenizer, eos_token="</s>", chat_template=template
    )
    with pytest.raises(MokaError, match="turn_markers"):
        turn_markers(tokenizer)


def padded(row, left, right, fill):
    return np.pad(row, ((0, 0), (left, right)), constant_values=fill)


@pytest.mark.parametrize("template", ["chatml", "vicuna", "glm", "llama2"])
def test_padding_and_packing_change_no_sample(template):
    markers = turn_markers(tokenizer_for(template, "gpt4"))
    samples = [build(template, "gpt4", chat) for chat in CHATS.values()]
    alone_markers, alone_labels = [], []
    for ids, media, keys, labels, _ in samples:
        zero = np.zeros_like(ids)
        alone_markers.append(question_groups(ids, media, keys, zero, markers)[0])
        alone_labels.append(groups_from_labels(labels, media, keys, zero)[0])
        for left, right in ((5, 0), (0, 5), (3, 4)):
            fills = (int(markers["user"][0]), False, True, -100)  # the padding token may be one of a marker
            row = [padded(one, left, right, fill) for one, fill in zip((ids, media, keys, labels), fills, strict=True)]
            valid = padded(np.ones_like(media), left, right, False)
            where = segments(valid.shape, valid, np.cumsum(valid, axis=1) - 1 + (~valid))
            np.testing.assert_array_equal(where, np.where(valid, 0, -1))
            for groups, by_itself in (
                (question_groups(*row[:3], where, markers)[0], alone_markers[-1]),
                (groups_from_labels(row[3], *row[1:3], where)[0], alone_labels[-1]),
                (groups_from_prompt(*row[1:3], where), groups_from_prompt(media, keys, zero)),
            ):
                np.testing.assert_array_equal(groups, padded(by_itself, left, right, 0))
    packed = [np.concatenate(columns, axis=1) for columns in zip(*samples, strict=True)]
    lengths = [one[0].shape[1] for one in samples]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    valid = np.ones_like(packed[1])
    where = segments(valid.shape, valid, positions)
    np.testing.assert_array_equal(where[0], np.repeat(np.arange(len(lengths)), lengths))
    np.testing.assert_array_equal(where, segments(valid.shape, valid, None, np.cumsum([0, *lengths])))
    for groups, by_itself in (
        (question_groups(*packed[:3], where, markers)[0], alone_markers),
        (groups_from_labels(packed[3], packed[1], packed[2], where)[0], alone_labels),
    ):
        pairs, used = [], set()
        for part, single in zip(np.split(groups, np.cumsum(lengths)[:-1], axis=1), by_itself, strict=True):
            pairs.append((part[0][:, None] == part[0]) & (part[0] > 0))
            np.testing.assert_array_equal(pairs[-1], (single[0][:, None] == single[0]) & (single[0] > 0))
            assert not used & set(part[part > 0].tolist())  # no two samples share a group
            used |= set(part[part > 0].tolist())


def readable(groups, media):
    """[seq, seq]: which key each medium of a row reads."""
    row = groups[0]
    return (row[:, None] == row) & (row > 0) & media[0][:, None] & ~media[0]


@pytest.mark.parametrize("route", ["markers", "labels"])
@pytest.mark.parametrize(
    ("template", "kind"), [("chatml", "gpt4"), ("llava", "metaspace"), ("llama2", "gpt2"), ("glm", "gpt4")]
)
def test_no_answer_and_no_later_question_decides_what_an_earlier_medium_reads(template, kind, route):
    markers = turn_markers(tokenizer_for(template, kind))
    generator = np.random.default_rng(0)

    def reads(ids, media, keys, labels):
        if route == "markers":
            return readable(question_groups(ids, media, keys, np.zeros_like(ids), markers)[0], media)
        return readable(groups_from_labels(labels, media, keys, np.zeros_like(ids))[0], media)

    for chat in (CHATS["two turns"], [*CHATS["two turns"], *CHATS["medium in an answer"]]):
        ids, media, keys, labels, roles = build(template, kind, chat)
        base = reads(ids, media, keys, labels)
        assert base.any()
        for position in np.flatnonzero(media[0]):
            behind = [i for i, (role, _) in enumerate(chat) if role == "assistant" and i >= roles[0, position]]
            first = np.flatnonzero(np.isin(roles[0], behind) & (roles[0] >= 0))[0]
            assert not base[position, first:].any()
        answers = [i for i, (role, _) in enumerate(chat) if role == "assistant"]
        for changed in range(answers[0], len(chat)):
            tokens = np.flatnonzero((roles[0] == changed) & keys[0])
            for _ in range(20):
                other = ids.copy()
                # Also tokens of the markers: a user may write them, a model may sample them.
                other[0, tokens] = generator.choice([*chain(*markers.values()), *ids[0]], len(tokens))
                new = reads(other, media, keys, np.where(labels != -100, other, -100))
                np.testing.assert_array_equal(new[: tokens[0]], base[: tokens[0]])


def numbers(text):
    """Tokens written as letters: q question, a supervised, s unsupervised structure, i image, A supervised image."""
    letters = np.array([list(text)])
    media = np.isin(letters, ["i", "A"])
    return np.where(np.isin(letters, ["a", "A"]), 5, -100), media, letters == "q", np.zeros(letters.shape, int)


@pytest.mark.parametrize(
    ("row", "groups", "unasked"),
    [
        ("qsisqaaqqiqaa", "1010100222200", False),
        ("qqaaiaaAaqqiaa", "11001001022200", False),  # media in an answer split nothing
        ("qqaasisaaqa", "11000100020", False),  # with their structure tokens either
        ("qiaasiqa", "11000220", False),  # after an answer and before the next question: of the next turn
        ("qiaaqq", "110000", False),  # after the last answer
        ("aaaiiaaa", "00011000", True),  # labels = input_ids, the image masked
        ("iiaaaqqa", "11000220", True),
        ("aaaaqqia", "00002220", True),
        ("aaaa", "0000", False),
        ("qqiqq", "11111", False),
    ],
)
def test_without_markers_a_turn_is_what_is_before_a_supervised_span(row, groups, unasked):
    result, flagged = groups_from_labels(*numbers(row))
    assert "".join(map(str, result[0])) == groups
    assert flagged.tolist() == [unasked]


def test_the_notebook_recipe_is_flagged_in_the_row_and_sample_that_has_it():
    ids, media, keys, labels, _ = build("chatml", "gpt4", CHATS["two turns"])
    everything = np.where(media, -100, ids)
    rows = np.concatenate([labels, everything]), np.repeat(media, 2, 0), np.repeat(keys, 2, 0)
    assert groups_from_labels(*rows, np.zeros_like(rows[0]))[1].tolist() == [False, True]
    both = [np.concatenate([one, one], axis=1) for one in (media, keys)]
    where = np.repeat([[0, 1]], media.shape[1], axis=1)
    assert groups_from_labels(np.concatenate([labels, everything], axis=1), *both, where)[1].tolist() == [True]


@pytest.mark.parametrize(
    ("position_ids", "valid", "expected_segments"),
    [
        ([[0, 1, 2, 0, 1, 0]], "111111", [[0, 0, 0, 1, 1, 2]]),
        ([[0, 0, 0, 1, 2, 3]], "001111", [[-1, -1, 0, 0, 0, 0]]),
        ([[1, 1, 0, 1, 2, 3]], "001111", [[-1, -1, 0, 0, 0, 0]]),
        ([[0, 1, 2, 3, 1, 1]], "111100", [[0, 0, 0, 0, -1, -1]]),
        ([[0, 1, 0, 1, 0, 0]], "111100", [[0, 0, 1, 1, -1, -1]]),
        ([[5, 6, 7, 8, 9, 10]], "111111", [[0] * 6]),
        ([[[0, 0, 0, 2, 0, 0]], [[0, 0, 1, 2, 0, 0]], [[0, 1, 0, 2, 0, 1]]], "111111", [[0, 0, 0, 0, 1, 1]]),
    ],
)
def test_samples_begin_where_position_ids_restart(position_ids, valid, expected_segments):
    valid = np.array([[letter == "1" for letter in valid]])
    assert segments(valid.shape, valid, np.array(position_ids)).tolist() == expected_segments


def test_cumulative_lengths_number_the_samples_and_must_fit():
    valid = np.ones((1, 5), bool)
    assert segments((1, 5), valid, None, np.array([0, 2, 2, 5])).tolist() == [[0, 0, 2, 2, 2]]
    for shape, ends in (((1, 5), [0, 9]), ((2, 5), [0, 10])):
        with pytest.raises(MokaError, match=rf"cu_seq_lens.*{ends[-1]}"):
            segments(shape, np.ones(shape, bool), None, np.array(ends))


def test_a_batch_of_long_rows_is_grouped_in_milliseconds():
    ids = np.random.default_rng(0).integers(10, 900, (32, 4096))
    ids[:, ::200], ids[:, 60::200] = 1, 2
    keys = np.ones(ids.shape, bool)
    markers = {"user": [1], "assistant": [2], "end": [3]}
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        groups, _ = question_groups(ids, ~keys, keys, np.zeros_like(ids), markers)
        seconds.append(time.perf_counter() - begin)
    assert groups.max() == 21
    assert min(seconds) < 0.2  # a loop over the tokens takes longer


def test_a_processor_without_a_chat_template(tiny_tokenizer):
    fast = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(moka.MokaError, match=rf"{type(fast).__name__}.*chat_template.*turn_markers"):
        moka.MokaConfig.from_processor(fast)
    config = moka.MokaConfig.from_processor(fast, turn_markers={"user": [1], "assistant": [2]})
    assert config.turn_markers == {"user": [1], "assistant": [2]}
