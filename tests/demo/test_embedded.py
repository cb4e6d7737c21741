"""The embedded backbone, drawings, recordings and the three tasks made of them."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from moka.data.schema import check_sample
from moka.demo.digit_tasks import DEFAULT_SIZES, TASKS, WORDS, EmbeddedTask
from moka.demo.embedded import SPLITS, Drawings, Recordings, resolve_backbone, split_indices
from moka.errors import MokaError
from moka.modeling.media import AudioFeatures

SIZES = {"drawings": (3600, 400, 1000), "recordings": (2160, 240, 600)}


def media(sample: dict) -> list:
    return [part[part["type"]] for part in sample["messages"][0]["content"] if part["type"] != "text"]


def question(sample: dict) -> str:
    return "".join(part["text"] for part in sample["messages"][0]["content"] if part["type"] == "text")


def answer(sample: dict) -> str:
    return sample["messages"][1]["content"][0]["text"]


def as_bytes(medium) -> bytes:
    return medium.values.tobytes() if isinstance(medium, AudioFeatures) else np.asarray(medium).tobytes()


def frozen(sample: dict) -> tuple:
    return sample["id"], sample["category"], question(sample), answer(sample), *map(as_bytes, media(sample))


@pytest.fixture(scope="module")
def digit_of() -> dict[bytes, int]:
    """The label of every stored drawing and recording, by its bytes."""
    drawings, recordings = Drawings.load(), Recordings.load()
    known = {image.tobytes(): int(label) for image, label in zip(drawings.images, drawings.labels, strict=True)}
    for values, label in zip(recordings.features, recordings.labels, strict=True):
        known[values.tobytes()] = int(label)
    return known


@pytest.fixture(scope="module")
def backbone():
    folder = resolve_backbone("embedded:smollm2-135m")
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_backbone_knows_the_capital_of_france(backbone):
    _, model, tokenizer = backbone
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(made[0]) == "The capital of France is Paris"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(made[0, chat["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_the_backbone_is_an_ordinary_float32_model_with_tied_embeddings(backbone):
    folder, model, tokenizer = backbone
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.num_parameters(), len(tokenizer)) == (134_515_008, 49152)
    # 4 bytes a parameter: the embedding is stored once, not twice.
    assert (folder / "model.safetensors").stat().st_size < 4 * 134_515_008 + 100_000
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "generation_config.json", "tokenizer.json"}


def test_the_backbone_is_made_once(backbone, capsys):
    folder, _, _ = backbone
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_backbone("embedded:smollm2-135m") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


def test_an_unknown_embedded_backbone_is_reported_with_the_nearest():
    with pytest.raises(MokaError, match=r"'embedded:smolm2'.*Did you mean 'embedded:smollm2-135m'"):
        resolve_backbone("embedded:smolm2")


def test_the_drawings_are_the_5000_of_mnist():
    drawings = Drawings.load()
    assert (drawings.images.shape, drawings.images.dtype) == ((5000, 28, 28), np.uint8)
    assert np.bincount(drawings.labels).tolist() == [500] * 10
    assert drawings.images[:, 0].max() == 0  # a black border, ink in the middle
    assert drawings.images[:, 4:24, 4:24].mean() > 3 * drawings.images.mean() / 2
    ones, zeros = (drawings.images[drawings.labels == digit].mean() for digit in (1, 0))
    assert ones < zeros / 2


def test_the_recordings_are_the_3000_of_free_spoken_digit():
    recordings = Recordings.load()
    lengths = [len(values) for values in recordings.features]
    assert (min(lengths), max(lengths), sum(lengths)) == (6, 92, 53999)
    assert {(values.shape[1], values.dtype) for values in recordings.features} == {(13, np.dtype(np.float32))}
    assert np.bincount(recordings.labels).tolist() == [300] * 10
    # "Six" and "seven" begin with an s, which is bright: a low second coefficient. "Nine" does not.
    start = {
        d: np.mean([v[:4, 1].mean() for v, y in zip(recordings.features, recordings.labels, strict=True) if y == d])
        for d in (6, 7, 9)
    }
    assert max(start[6], start[7]) < start[9]


def test_parsed_arrays_are_cached_and_need_the_wheel_no_more(monkeypatch):
    first = Recordings.load()
    monkeypatch.setattr("moka.demo.embedded.fetch", lambda wheel: pytest.fail("the wheel was asked for again"))
    again = Recordings.load()
    assert all(np.array_equal(a, b) for a, b in zip(first.features, again.features, strict=True))


@pytest.mark.parametrize("kind", ["drawings", "recordings"])
def test_splits_are_disjoint_complete_balanced_and_fixed(kind):
    labels = {"drawings": Drawings, "recordings": Recordings}[kind].load().labels
    parts = [split_indices(kind, split) for split in SPLITS]
    assert tuple(len(part) for part in parts) == SIZES[kind]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for part in parts:
        assert np.bincount(labels[part]).tolist() == [len(part) // 10] * 10
    # Golden: results are only comparable over versions while these stay.
    golden = {"drawings": [2, 9, 12, 15, 17, 19], "recordings": [3, 7, 15, 16, 18, 19]}
    assert split_indices(kind, "test")[:6].tolist() == golden[kind]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_fixed_lists_are_balanced_correct_and_of_their_split_only(name, split, digit_of):
    task = EmbeddedTask(name, split)
    samples = list(task)
    assert len(samples) == DEFAULT_SIZES[split]
    assert set(Counter(s["category"] for s in samples).values()) == {len(samples) // len(task.categories)}
    assert set(Counter(s["category"] for s in samples[: 5 * len(task.categories)]).values()) == {5}
    assert len({s["id"] for s in samples}) == len(samples)
    drawings, recordings = Drawings.load(), Recordings.load()
    allowed = {drawings.images[i].tobytes() for i in split_indices("drawings", split)}
    allowed |= {recordings.features[i].tobytes() for i in split_indices("recordings", split)}
    for sample in samples:
        shown = [as_bytes(medium) for medium in media(sample)]
        assert allowed.issuperset(shown)
        assert answer(sample) == right_answer(question(sample), *[digit_of[key] for key in shown])


def right_answer(asked: str, a: int, b: int) -> str:
    """The rules once more, from the question's words only."""
    if "plus" in asked:
        return WORDS[(b if "right" in asked or "second" in asked else a) + WORDS.index(asked.split()[-1].rstrip("?"))]
    return {
        "Which digit is written?": WORDS[a],
        "Which digit is spoken?": WORDS[b],
        "Do image and sound show the same digit?": ["no", "yes"][a == b],
        "What is the sum of both digits?": WORDS[a + b],
        "Which digit is on the left?": WORDS[a],
        "Which digit is on the right?": WORDS[b],
        "Which digits are written?": f"{WORDS[a]} {WORDS[b]}",
        "Which digit is larger?": WORDS[max(a, b)],
        "Which digit is spoken first?": WORDS[a],
        "Which digit is spoken second?": WORDS[b],
        "Transcribe both digits.": f"{WORDS[a]} {WORDS[b]}",
    }[asked]


def test_guessing_does_not_pay():
    counts = Counter((s["category"], answer(s)) for s in EmbeddedTask(split="test"))
    best = {kind: max(n for (k, _), n in counts.items() if k == kind) / 250 for kind in ("written", "spoken", "sum")}
    assert best["written"] == best["spoken"] == 0.1
    assert best["sum"] < 0.15
    assert counts["same", "yes"] == counts["same", "no"] == 125


def test_a_smaller_fixed_list_is_the_beginning_of_the_full_one_whatever_the_seed():
    full, part = EmbeddedTask(split="test"), EmbeddedTask(split="test", size=12, seed=7)
    assert len(part) == 12
    assert [frozen(full[i]) for i in range(12)] == [frozen(s) for s in part]


def test_the_test_list_never_changes():
    # Golden: results are only comparable over versions while this stays.
    asked = [(question(s), answer(s)) for s in EmbeddedTask(split="test", size=4)]
    assert asked == [
        ("Which digit is written?", "eight"),
        ("Which digit is spoken?", "four"),
        ("Do image and sound show the same digit?", "yes"),
        ("What is the sum of both digits?", "fourteen"),
    ]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_item_depends_on_seed_and_index_only(stage):
    task, again = EmbeddedTask(stage=stage, seed=3), EmbeddedTask(stage=stage, seed=3, size=50)
    backwards = {i: frozen(again[i]) for i in reversed(range(20))}
    assert [frozen(task[i]) for i in range(20)] == [backwards[i] for i in range(20)]
    other = EmbeddedTask(stage=stage, seed=4)
    assert [frozen(task[i])[2:] for i in range(20)] != [frozen(other[i])[2:] for i in range(20)]


def test_augmentation_varies_the_media_but_not_the_questions_or_the_items():
    plain, varied = EmbeddedTask(augment=False), EmbeddedTask()
    images = Drawings.load().images
    train = {images[i].tobytes() for i in split_indices("drawings", "train")}
    for i in range(40):
        (image, sound), (image2, sound2) = media(plain[i]), media(varied[i])
        assert frozen(plain[i])[:4] == frozen(varied[i])[:4]
        assert as_bytes(image) in train
        assert as_bytes(image) != as_bytes(image2)
        assert sound.values.tobytes() != sound2.values.tobytes()
        # Varied a little, not turned into another thing: most of the ink and of the spectrum's shape stays.
        a, b = np.asarray(image, float), np.asarray(image2, float)
        assert abs(a.mean() - b.mean()) < 0.35 * a.mean()
        np.testing.assert_allclose(sound.values[:, 1:].mean(0), sound2.values[:, 1:].mean(0), atol=6)
        assert 0.85 * len(sound.values) - 1 < len(sound2.values) < 1.15 * len(sound.values) + 1


def test_only_training_is_augmented(digit_of):
    assert all(as_bytes(medium) in digit_of for s in EmbeddedTask(split="test", size=20) for medium in media(s))


@pytest.mark.parametrize(
    ("name", "categories"),
    [
        ("audio-visual-text", ("drawing", "recording")),
        ("visual-text", ("drawing",)),
        ("speech-text", ("recording",)),
    ],
)
def test_stage_1_pairs_one_medium_with_its_word(name, categories, digit_of):
    samples = list(EmbeddedTask(name, size=200, stage=1, augment=False))
    assert [s["category"] for s in samples] == [categories[i % len(categories)] for i in range(200)]
    for sample in samples:
        (medium,) = media(sample)
        assert question(sample) == ""
        assert isinstance(medium, AudioFeatures) == (sample["category"] == "recording")
        assert answer(sample) == WORDS[digit_of[as_bytes(medium)]]
    assert len({answer(s) for s in samples}) == 10


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("stage", [1, 2])
def test_samples_are_in_the_normal_form_of_the_schema(name, stage):
    for sample in EmbeddedTask(name, size=10, stage=stage):
        assert frozen(check_sample(sample, "embedded:1")) == frozen(sample)
        for medium in media(sample):
            if isinstance(medium, Image.Image):
                assert (medium.mode, medium.size) == ("L", (28, 28))
            else:
                assert (medium.kind, medium.values.shape[1], medium.values.dtype) == ("mfcc", 13, np.float32)


def test_indexing_is_that_of_a_sequence():
    task = EmbeddedTask(size=5)
    assert frozen(task[-1]) == frozen(task[4])
    with pytest.raises(IndexError):
        task[5]
    assert frozen(pickle.loads(pickle.dumps(task))[2]) == frozen(task[2])  # as loader workers get it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "audio-visual"}, "Did you mean 'audio-visual-text'"),
        ({"split": "valid"}, "train, validation, test"),
        ({"stage": 3}, "stage is 3"),
        ({"seed": -1}, "seed is -1"),
        ({"size": 0}, "size is 0"),
        ({"split": "test", "size": 1001}, "1000 questions"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(MokaError, match=message):
        EmbeddedTask(**arguments)
