"""``moka.MultimodalCollator``: what a real processor's batch must have, and the same loss under every trainer."""

import copy

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

import moka
from moka.modeling.media import Waveform
from moka.testing.tiny_mllms import KINDS, MEDIA, tiny_model, tiny_processor

GENERATOR = np.random.default_rng(0)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def processor(kind):
    return tiny_processor(kind)


def media_of(kind, number=0):
    sound = Waveform(GENERATOR.standard_normal(4000 + 999 * number).astype(np.float32) / 9, 8000)
    picture = Image.fromarray(GENERATOR.integers(0, 255, (16 + number, 20, 3), np.uint8))
    frames = [picture.rotate(90 * turn) for turn in range(3)]
    parts = {"image": picture, "video": frames, "audio": sound}
    return [{"type": name, name: parts[name]} for name in MEDIA[kind]]


def samples_of(kind):
    """One question with all media; two turns, media in the first; two turns, the same answer twice."""

    def chat(*turns, media=((), ())):
        messages = []
        for (question, answer), parts in zip(turns, media, strict=False):
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages}

    return [
        chat(("Which digit is spoken?", "seven"), media=[media_of(kind)]),
        chat(("Which is written?", "two\n\nmaybe"), ("And then?", "  three"), media=[media_of(kind, 1), ()]),
        chat(("Is it one?", "Yes."), ("Is it two?", "Yes."), media=[media_of(kind, 2), media_of(kind, 3)[:1]]),
    ]


def words(processor, ids):
    return processor.tokenizer.decode(ids[ids != -100])


def test_only_answers_and_their_ends_are_supervised(kind, processor):
    batch = moka.MultimodalCollator(processor)(samples_of(kind))
    found = [words(processor, row) for row in batch["labels"]]
    assert found == ["seven<|im_end|>", "two\n\nmaybe<|im_end|>  three<|im_end|>", "Yes.<|im_end|>Yes.<|im_end|>"]
    inside = batch["labels"] != -100
    assert torch.equal(batch["labels"][inside], batch["input_ids"][inside])


def test_a_row_is_what_the_processor_and_the_router_make(kind, processor):
    samples = samples_of(kind)
    batch = moka.MultimodalCollator(processor, padding_side="left")(samples)
    config = moka.MokaConfig.from_processor(processor, task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(tiny_model(kind), config).eval()
    derived = {name: value for name, value in batch.items() if name not in ("mm_token_type_ids", "interaction_ids")}
    if kind != "qwen2-audio":  # positions of these models are made from the type ids
        derived["mm_token_type_ids"] = batch["mm_token_type_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**derived).loss, atol=1e-6, rtol=0)
        together = model(**batch).logits
        for row, sample in enumerate(samples):
            single = moka.MultimodalCollator(processor)([sample])
            length = single["input_ids"].shape[1]
            assert torch.equal(single["input_ids"][0], batch["input_ids"][row, -length:])
            torch.testing.assert_close(model(**single).logits[0], together[row, -length:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_trainers_compute_the_same_loss(kind, processor, tmp_path, trainer):
    samples = Dataset.from_list(in_files(samples_of(kind), tmp_path))
    collator = moka.MultimodalCollator(processor)
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": len(samples),
        "max_steps": 1,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    config = moka.MokaConfig.from_processor(processor, task_type="CAUSAL_LM", init_weights=False, dropout=0.0)
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(kind), config)
    expected = model(**collator(list(samples))).loss.item()
    if trainer == "trl":
        trl = pytest.importorskip("trl", minversion="1.16")
        arguments = trl.SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False)
        made = trl.SFTTrainer(
            model, arguments, train_dataset=samples, data_collator=collator, processing_class=processor
        )
    else:
        made = tf.Trainer(model, tf.TrainingArguments(**settings), train_dataset=samples, data_collator=collator)
    made.train()
    (logged,) = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, abs=1e-5)


def in_files(samples, folder):
    """The samples with media in files and content as parts, as tables need them."""
    rows = []
    for i, sample in enumerate(samples):
        messages = []
        for j, message in enumerate(sample["messages"]):
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else [dict(part) for part in parts]
            for k, part in enumerate(parts):
                path = str(folder / f"{i}-{j}-{k}")
                if part["type"] == "image":
                    part["image"].save(f"{path}.png")
                    part["image"] = f"{path}.png"
                elif part["type"] == "video":
                    part |= {"type": "image", "image": f"{path}.png"}  # a film would need an encoder of films here
                    part.pop("video")[0].save(f"{path}.png")
                elif part["type"] == "audio":
                    soundfile.write(f"{path}.wav", part["audio"].samples, part["audio"].rate)
                    part["audio"] = f"{path}.wav"
            messages.append({"role": message["role"], "content": parts})
        rows.append({"messages": messages})
    return rows


def user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "one"}]}


@pytest.mark.parametrize(
    ("sample", "settings", "words"),
    [
        (user({"type": "audio", "audio": "none.wav"}), {}, ["none.wav"]),
        (user({"type": "image", "image": "none.png"}), {}, ["none.png"]),
        (user({"type": "text", "text": "which?"}), {"max_length": 8}, ["max_length 8"]),
        ({"messages": [{"role": "user", "content": "which?"}]}, {}, ["assistant"]),
        ({"text": "which?"}, {}, ["messages"]),
        ({**user({"type": "text", "text": "which?"}), "images": [1]}, {}, ["images"]),
    ],
)
def test_bad_samples_are_named(processor, sample, settings, words):
    with pytest.raises(moka.MokaError) as caught:
        moka.MultimodalCollator(processor, **settings)([sample])
    for word in words:
        assert word in str(caught.value)


def test_a_medium_that_the_model_does_not_take(kind, processor):
    other = [part for part in media_of("qwen2.5-omni") if part["type"] not in MEDIA[kind]]
    for part in other:
        with pytest.raises(moka.MokaError, match=rf"sample .*'{part['type']}'.*takes text, {', '.join(MEDIA[kind])}"):
            moka.MultimodalCollator(processor)([user(part)])
    assert other or kind == "qwen2.5-omni"


def test_processors_that_cannot_be_used(processor):
    bare = copy.copy(processor)
    bare.chat_template = None
    with pytest.raises(moka.MokaError, match="chat_template"):
        moka.MultimodalCollator(bare)
    with pytest.raises(moka.MokaError, match=r"padding_side: 'up'.*left, right"):
        moka.MultimodalCollator(processor, padding_side="up")


def test_a_template_that_rewrites_earlier_answers(kind, processor):
    """As Qwen3's: only the last answer begins with its thoughts."""
    thinking = copy.copy(processor)
    thinking.chat_template = processor.chat_template.replace(
        "{{ message['role'] }}\n",
        "{{ message['role'] }}\n{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}",
    )
    collator = moka.MultimodalCollator(thinking)
    one, two = samples_of(kind)[:2]
    assert words(processor, collator([one])["labels"][0]).endswith("seven<|im_end|>")
    with pytest.raises(moka.MokaError, match=r"chat template.*another way"):
        collator([two])


def test_lora_takes_the_same_batches_without_routing(kind, processor):
    batch = moka.MultimodalCollator(processor)(samples_of(kind))
    batch.pop("interaction_ids")
    if kind == "qwen2-audio":
        batch.pop("mm_token_type_ids")
    model = get_peft_model(tiny_model(kind), LoraConfig(target_modules=r".*language_model.*q_proj"))
    assert torch.isfinite(model(**batch).loss)
