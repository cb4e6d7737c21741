"""A composed model on a device trains without a value that comes back from it, where the ids stay in host memory too.

The device is torch's ``meta``, whose tensors have no values: whoever reads one back fails.
"""

import contextlib
import copy
import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, Qwen2_5_VLTextConfig

from moka import MokaConfig, MokaForConditionalGeneration
from moka.data.sources import Collator
from moka.host import HostIds
from moka.modeling.configuration import MokaModelConfig
from moka.modeling.positions import samples_begin
from moka.training.objectives import EmbeddingAlignment

META = torch.device("meta")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
BACKBONES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2.5-vl": Qwen2_5_VLTextConfig(**SHAPE, rope_parameters=ROPE, tie_word_embeddings=False),
}
MODALITIES = {
    "visual": {
        "encoder": {"type": "conv-image", "image_size": 8, "channels": [4, 4], "width": 8, "num_tokens": 2},
        "projector": {"type": "linear"},
    },
    "audio": {
        "encoder": {"type": "conv-audio", "frames": 8, "channels": [6], "width": 8, "num_tokens": 3},
        "projector": {"type": "mlp"},
    },
}


def composed(backbone="llama"):
    torch.manual_seed(0)
    return MokaForConditionalGeneration(MokaModelConfig(copy.deepcopy(BACKBONES[backbone]), copy.deepcopy(MODALITIES)))


def adapted(model, method="moka"):
    settings = {"task_type": "CAUSAL_LM", "modules_to_save": ["projectors.visual", "projectors.audio"]}
    kind = (
        LoraConfig(r=4, target_modules=["q_proj"], **settings)
        if method == "lora"
        else MokaConfig(dropout=0.0, **settings)
    )
    return get_peft_model(model, kind)


def encoded(media):
    """One sample as ``MokaProcessor.encode`` makes it: pictures (two tokens), sound (three), question, answer."""
    types = [0] + [1, 1] * media.count("i") + [3, 3, 3] * media.count("a") + [0] * 6
    answer = [IGNORED] * (len(types) - 2) + [7, 8]
    generator = torch.Generator().manual_seed(len(types))
    one = {
        "input_ids": [63 + t if t else 5 for t in types],
        "attention_mask": [1] * len(types),
        "labels": answer,
        "mm_token_type_ids": types,
        "interaction_ids": [int(t > 0 or 1 <= len(types) - i <= 5) for i, t in enumerate(types)],
        "sample_id": media,
    }
    if "i" in media:
        one["pixel_values"] = torch.randn(media.count("i"), 1, 8, 8, generator=generator).numpy()
    if "a" in media:
        one["input_features"] = torch.randn(media.count("a"), 14, 8, generator=generator).numpy()
    return one


IGNORED = -100


class Padding:
    """What ``Collator`` needs of a processor."""

    modalities = dict.fromkeys(MODALITIES)

    def pad(self, samples, padding_side="left"):
        longest = max(len(one["input_ids"]) for one in samples)
        fill = {"labels": IGNORED}
        batch = {}
        for name in samples[0]:
            if isinstance(samples[0][name], list):
                rows = [[fill.get(name, 0)] * (longest - len(one[name])) + one[name] for one in samples]
                batch[name] = torch.tensor(rows)
        for name in ("pixel_values", "input_features"):
            items = [torch.from_numpy(one[name]) for one in samples if name in one]
            if items:
                batch[name] = torch.cat(items)
        return batch


def collated(*media, **extra):
    batch = Collator(Padding())([encoded(one) for one in media])
    batch.pop("sample_ids")
    return {**batch, **extra}


def packed(*media):
    """Two samples in one row, as ``moka.data.packing`` joins them."""
    first, second = (encoded(one) for one in media)
    positions = [i for one in (first, second) for i in range(len(one["input_ids"]))]
    row = {name: first[name] + second[name] for name in first if isinstance(first[name], list)}
    pictures = {
        name: one[name] for one in (first, second) for name in ("pixel_values", "input_features") if name in one
    }
    batch = Collator(Padding())([{**row, **pictures, "position_ids": positions}])
    batch.pop("sample_ids")
    return batch


BATCHES = {
    "media": lambda: collated("ia", "i", ""),
    "one medium": lambda: collated("i", "ii"),
    "text": lambda: collated("", ""),
    "packed": lambda: packed("i", "a"),
}


@pytest.fixture(autouse=True)
def _others_read_no_values(monkeypatch):
    """transformers asks masks and positions whether they can be left out; where it traces a graph, it does not."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    # Autocast knows no such device.
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr("torch.autocast", lambda *_, **settings: contextlib.nullcontext())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", ["moka", "lora"])
def test_a_training_step_reads_nothing_back(batch, backbone, method):
    model = adapted(composed(backbone), method).to(META).train()
    given = send_to_device(BATCHES[batch](), META)
    model(**given, loss_only=True).loss.backward()
    given.pop("host_ids")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model(**given)  # without them it has to


def test_stage_1_without_the_language_model_reads_nothing_back():
    model = EmbeddingAlignment(composed()).to(META).train()
    model(**send_to_device(collated("ia", "i"), META)).loss.backward()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_host_ids_change_no_number(batch, backbone):
    model = adapted(composed(backbone)).eval()
    given = BATCHES[batch]()
    known = given.pop("host_ids")
    expected = model(**given)
    got = model(**given, host_ids=known)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", ["moka", "lora"])
def test_without_host_ids_a_forward_reads_back_once(batch, method, monkeypatch):
    """The routing and the model share what came back. Here every tensor counts as lying on a device."""
    reads = []

    def read(away):
        reads.append(list(away))
        return {name: ids.clone() for name, ids in away.items()}

    monkeypatch.setattr("moka.host._read_back", read)
    monkeypatch.setattr(HostIds, "find", lambda self, name, ids: self._copies.get(name))
    given = BATCHES[batch]()
    given.pop("host_ids")
    model = adapted(composed(), method).eval()
    model(**given)
    assert len(reads) == 1, reads


def test_host_ids_stay_where_they_are_on_the_way_of_a_batch():
    """Through a worker of the loader, and to the device."""
    samples = [encoded("ia"), encoded("i")]
    (batch,) = DataLoader(samples, batch_size=2, collate_fn=Collator(Padding()), num_workers=1)
    moved = send_to_device(batch, META)
    assert moved["input_ids"].device == META
    for name in ("input_ids", "labels", "mm_token_type_ids", "interaction_ids", "attention_mask"):
        assert torch.equal(moved["host_ids"].find(name, moved[name]), batch[name])
    again = pickle.loads(pickle.dumps(moved["host_ids"]))
    assert torch.equal(again.find("labels", moved["labels"]), batch["labels"])


def test_generation_takes_a_batch_with_host_ids():
    model = adapted(composed()).eval()
    given = collated("ia", "i")
    known = given.pop("host_ids")
    given = {name: value for name, value in given.items() if name not in ("labels", "supervised")}
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**given, host_ids=known, **options), model.generate(**given, **options))


def test_packed_rows_are_packed():
    positions = packed("i", "a")["position_ids"]
    begins = samples_begin(positions)
    assert begins is not None
    assert torch.equal(begins, positions == 0)
    assert begins.sum() == 2
