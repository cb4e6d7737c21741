"""Packing: a row of several samples is, number for number, the samples by themselves."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from moka import MokaConfig, MokaForConditionalGeneration, MokaProcessor
from moka.data.encoding import Collator, EncodedDataset
from moka.data.lengths import count_lengths, joined_lengths
from moka.data.packing import PackedDataset, join_samples, pack_rows
from moka.errors import MokaError
from moka.modeling.configuration import MokaModelConfig
from moka.modeling.media import AudioFeatures
from moka.modeling.packing_isolation import check_confined
from moka.modeling.positions import flash_lengths, samples_begin
from moka.testing.tiny import write_tiny_backbone

CONV = {
    "visual": {
        "encoder": {
            "type": "conv-image",
            "image_size": 8,
            "channels": [4, 4],
            "width": 8,
            "num_tokens": 2,
            "dropout": 0.0,
        },
        "projector": {"type": "linear"},
    },
    "audio": {
        "encoder": {"type": "conv-audio", "frames": 8, "channels": [6], "width": 8, "num_tokens": 3, "dropout": 0.0},
        "projector": {"type": "mlp"},
    },
}
# Question, answer; a second question makes a chat of two turns.
CHATS = [
    ("image which digit", "seven"),
    ("audio image audio is the same", "yes"),
    ("which digit is spoken", "no no", "image and which is written", "four"),
    ("video two video audio same", "four"),
    ("which", "one two three four five"),
]


def medium(kind, seed):
    random = np.random.default_rng(seed)
    if kind == "audio":
        return AudioFeatures(random.normal(0, 40, (6, 13)).astype(np.float32), "mfcc")
    pictures = [Image.fromarray(random.integers(0, 255, (9, 9), dtype=np.uint8)) for _ in range(3)]
    return pictures if kind == "video" else pictures[0]


def sample(number, texts):
    messages = []
    for turn, text in enumerate(texts):
        if turn % 2:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
            continue
        content = []
        for place, word in enumerate(text.split()):
            kind = word if word in ("image", "audio", "video") else "text"
            content.append(
                {"type": kind, kind: word if kind == "text" else medium(kind, 97 * number + 7 * turn + place)}
            )
        messages.append({"role": "user", "content": content})
    return {"id": f"s{number}", "messages": messages}


SAMPLES = [sample(number, texts) for number, texts in enumerate(CHATS)]


def build(folder, adapter="moka", implementation="sdpa", modalities=CONV):
    torch.manual_seed(1)
    model = MokaForConditionalGeneration.from_backbone(
        folder, modalities, attn_implementation=implementation, dtype=torch.float32
    )
    for projector in model.projectors.values():
        if projector.output is not None:
            projector.output.weight.data.normal_(std=0.2)
    processor = MokaProcessor.from_model(model, AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(2)
    parts = [f"{kind}.{name}" for kind in ("encoders", "projectors") for name in modalities]
    if adapter == "lora":
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=parts)
    else:
        config = MokaConfig(dropout=0.0, init_weights=False, task_type="CAUSAL_LM", modules_to_save=parts)
    return get_peft_model(model, config).train(), processor


def totals(model, batches):
    """Summed loss per supervised token of all batches, and the gradients of everything trained."""
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        out = model(**{k: v for k, v in batch.items() if k != "sample_ids"}, num_items_in_batch=torch.tensor(items))
        out.loss.backward()
        loss += out.loss.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(bool(grad.any()) for name, grad in gradients.items() if "moka_" in name or "lora_" in name)
    return loss, gradients


def assert_equal_training(model, processor, rows, **collation):
    encoded = [{**processor.encode(one["messages"]), "sample_id": one["id"]} for one in SAMPLES]
    by_itself = [Collator(processor)([one]) for one in encoded]
    packed = [Collator(processor, **collation)([join_samples([encoded[k] for k in row]) for row in rows])]
    loss, gradients = totals(model, by_itself)
    packed_loss, packed_gradients = totals(model, packed)
    torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    for name, grad in gradients.items():
        # The bias before a norm has no gradient but rounding errors, which have no scale of their own.
        scale = max(float(grad.abs().max()), 1e-2)
        difference = float((packed_gradients[name] - grad).abs().max()) / scale
        assert difference < 1e-5, (name, difference, scale)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_all_gradients_are_those_of_the_samples_only(backbones, name, implementation, side):
    model, processor = build(backbones[name], implementation=implementation)
    # Rows of unequal length, so that there is padding; one of them has a single sample.
    assert_equal_training(model, processor, [[2, 0, 4], [3, 1]], padding_side=side)
    assert_equal_training(model, processor, [[0, 1, 2, 3], [4]], padding_side=side)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_equal_under_gradient_checkpointing(backbones, reentrant):
    model, processor = build(backbones["llama"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal_training(model, processor, [[3, 0, 4], [2, 1]])


def test_lora_is_packed_too(backbones):
    model, processor = build(backbones["llama"], adapter="lora")
    assert_equal_training(model, processor, [[2, 0, 4], [3, 1]])


def test_a_backbone_with_positions_on_a_grid(tmp_path):
    write_tiny_backbone("qwen2.5-vl", tmp_path)
    sight = {"type": "qwen2.5-vl", "name_or_path": str(tmp_path), "image_size": 84}
    modalities = {"visual": {"encoder": sight, "projector": {"type": "identity"}}, "audio": CONV["audio"]}
    model, processor = build(str(tmp_path), modalities=modalities)
    for side in ("left", "right"):
        assert_equal_training(model, processor, [[2, 0, 4], [3, 1]], padding_side=side)


@pytest.fixture(scope="module")
def llama(backbones):
    return build(backbones["llama"])


@pytest.fixture(scope="module")
def encoded(llama):
    return [{**llama[1].encode(one["messages"]), "sample_id": one["id"]} for one in SAMPLES]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_no_sample_of_a_row_sees_another(backbones, encoded, name, implementation):
    model, processor = build(backbones[name], implementation=implementation)
    model.eval()
    order = [1, 3, 0, 2]

    def logits(samples):
        batch = Collator(processor)([join_samples(samples), join_samples([samples[0]])])
        with torch.no_grad():
            out = model(**{k: v for k, v in batch.items() if k not in ("sample_ids", "labels")}).logits[0]
        return torch.split(out, [len(one["input_ids"]) for one in samples])

    given = [encoded[k] for k in order]
    before = logits(given)
    for changed in range(len(order)):
        other = copy.deepcopy(given)
        one = other[changed]
        one["input_ids"] = [
            i if kind else (i + 7) % 300 + 10
            for i, kind in zip(one["input_ids"], one["mm_token_type_ids"], strict=True)
        ]
        for name in ("pixel_values", "input_features"):
            if name in one:
                one[name] = one[name] + 3
        after = logits(other)
        for place in range(len(order)):
            same = torch.equal(after[place], before[place])
            assert same != (place == changed), (place, changed)


TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
WIDE = {**TINY, "intermediate_size": 96, "num_key_value_heads": 2}
CONFINED = {
    "llama": LlamaConfig(**WIDE),
    "qwen2": Qwen2Config(**WIDE),
    "gemma3_text": Gemma3TextConfig(**WIDE, head_dim=16),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=400, bos_token_id=1, eos_token_id=2),
}
LEAKING = {
    "opt": OPTConfig(**TINY, ffn_dim=96, word_embed_proj_dim=64),
    "falcon": FalconConfig(**TINY),
    "bloom": BloomConfig(vocab_size=400, hidden_size=64, n_layer=2, n_head=4),
    "lfm2": Lfm2Config(**WIDE, layer_types=["full_attention", "conv"], initializer_range=0.2),
}


def composed(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    torch.manual_seed(1)
    return MokaForConditionalGeneration(MokaModelConfig(config, copy.deepcopy(CONV)), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*CONFINED, *LEAKING])
def test_a_backbone_in_which_samples_see_each_other_is_found(kind, dtype):
    model = composed({**CONFINED, **LEAKING}[kind], dtype).train()
    model.encoders.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind in CONFINED:
        check_confined(model)
    else:
        with pytest.raises(MokaError, match=rf"model_type '{kind}'.* Take training.packing out"):
            check_confined(model)
    assert model.training
    assert model.language_model.training
    assert not model.encoders["visual"].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.is_leaf and tensor.grad is None for tensor in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.language_model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [*CONFINED, *LEAKING])
def test_weights_are_brought_to_the_gpu_block_by_block(kind):
    model, seen = composed(CONFINED[kind] if kind in CONFINED else LEAKING[kind]), []
    blocks = next(m for m in model.language_model.modules() if isinstance(m, torch.nn.ModuleList))
    blocks[0].register_forward_hook(lambda *_: seen.extend(p.device.type for b in blocks for p in b.parameters()))
    if kind in CONFINED:
        check_confined(model, "cuda")
    else:
        with pytest.raises(MokaError, match=r"Take training.packing out"):
            check_confined(model, "cuda")
    assert sorted(set(seen)) == ["cpu", "cuda"]
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_positions_groups_labels_and_media_of_a_row(encoded):
    first, second, third = (copy.deepcopy(encoded[k]) for k in (2, 0, 1))
    second["labels"][0] = 5  # an answer that opens a sample has nothing before it to be predicted from
    row = join_samples([first, second, third])
    sizes = [len(one["input_ids"]) for one in (first, second, third)]
    assert row["position_ids"] == [p for size in sizes for p in range(size)]
    assert row["input_ids"] == first["input_ids"] + second["input_ids"] + third["input_ids"]
    labels = np.split(row["labels"], np.cumsum(sizes)[:-1])
    assert all(part[0] == -100 for part in labels)
    assert list(labels[0]) == first["labels"]
    groups = [set(part) - {0} for part in np.split(row["interaction_ids"], np.cumsum(sizes)[:-1])]
    assert groups == [{1, 2}, {3}, {4}]  # the first is a chat of two turns
    np.testing.assert_array_equal(
        row["pixel_values"], np.concatenate([one["pixel_values"] for one in (first, second, third)])
    )
    np.testing.assert_array_equal(row["input_features"], third["input_features"])
    assert row["sample_id"] == "s2, s0, s1"
    assert all(len(values) == sum(sizes) for name, values in row.items() if isinstance(values, list)), row.keys()


def test_flash_attention_is_reported_where_samples_begin_in_every_row():
    # Flash attention itself does not run on the CPU.
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    begins = samples_begin(positions, torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]))
    lengths = flash_lengths(begins)
    assert lengths["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 8, 12]
    assert lengths["cu_seq_lens_q"].dtype == torch.int32
    assert lengths["max_length_q"] == 4


def test_rows_of_one_sample_each_are_not_taken_for_packed():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert samples_begin((mask.cumsum(-1) - 1).clamp(min=0), mask) is None
    assert samples_begin(torch.tensor([[0, 1, 2, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])) is None
    assert samples_begin(torch.tensor([[0, 1, 2, 0, 1]])).tolist() == [[True, False, False, True, False]]


# --- which samples share a row


def as_lists(rows):
    return [row.tolist() for row in rows]


def test_every_sample_comes_once_and_no_row_is_overfull():
    tokens = np.random.default_rng(0).integers(1, 400, 5000)
    rows = pack_rows(tokens, 512, seed=3)
    assert sorted(index for row in rows for index in row) == list(range(5000))
    assert max(tokens[row].sum() for row in rows) <= 512
    assert rows.sums(tokens).tolist() == [tokens[row].sum() for row in rows]
    assert tokens.sum() / (len(rows) * 512) > 0.97
    assert as_lists(rows) == as_lists(pack_rows(tokens, 512, seed=3))
    assert as_lists(rows) != as_lists(pack_rows(tokens, 512, seed=4))
    assert (rows.indices.dtype, len(rows.indices), len(rows.offsets)) == (np.int64, 5000, len(rows) + 1)


def test_a_window_only_is_packed_with_itself():
    rows = pack_rows(np.full(64, 10), 40, seed=0, window=16)
    assert [len(row) for row in rows] == [4] * 16


def test_rows_are_filled_best_fit_and_the_longest_samples_come_first():
    assert as_lists(pack_rows([7, 50, 3], 40)) == [[1], [0, 2]]
    # 30 leaves 10, 25 leaves 15: the 12 goes where it only fits, the 10 fills the first row, 3 the second.
    assert as_lists(pack_rows([10, 30, 3, 25, 12], 40)) == [[1, 0], [3, 4, 2]]


def packed(processor, samples, capacity=150, **settings):
    dataset = EncodedDataset(samples, processor, capacity)
    lengths = joined_lengths(dataset, [count_lengths(dataset)])
    return PackedDataset(dataset, lengths, capacity, **settings)


def test_the_rows_of_a_data_set_hold_every_sample_and_their_lengths_are_known(llama):
    rows = packed(llama[1], SAMPLES * 3)
    found = [rows[k] for k in range(len(rows))]
    assert sorted(", ".join(row["sample_id"] for row in found).split(", ")) == sorted(s["id"] for s in SAMPLES * 3)
    assert [len(row["input_ids"]) for row in found] == rows.lengths.tokens.tolist()
    assert rows.lengths.items["visual"].sum() == 3 * (1 + 1 + 1 + 6)
    assert len(rows) < 15
    assert rows.summary() == f"packing: 15 samples in {len(rows)} rows of 150 tokens, fill {rows.fill:.0%}"


class Substituted:
    """A sample that has another in its place by the time it is read, longer than what was counted."""

    def __init__(self, samples):
        self.samples, self.grown = list(samples), None

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return SAMPLES[3] if index == self.grown else self.samples[index]


def test_a_substitute_that_is_too_long_for_its_row_is_left_out(llama):
    short, long = (len(llama[1].encode(SAMPLES[k]["messages"])["input_ids"]) for k in (4, 3))
    samples = Substituted([SAMPLES[4]] * 3)
    rows = packed(llama[1], samples, capacity=max(3 * short, long))
    assert len(rows) == 1
    assert [rows[0]["sample_id"], len(rows[0]["input_ids"])] == ["s4, s4, s4", 3 * short]
    assert long > short
    for grown in range(3):
        samples.grown = grown
        assert [rows[0]["sample_id"], len(rows[0]["input_ids"])] == ["s4, s4", 2 * short]
