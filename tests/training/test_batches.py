"""Runs that group their samples by length or pack them: exact on resume, and on two processes what they are on one."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from moka.errors import MokaError
from moka.training.checkpointing import last_checkpoint

GROUPED = {"training__train_sampling_strategy": "group_by_length"}
PACKED = {"training__packing": True, "model__max_length": 96}
SAME = {
    "stages": [2],
    "adapter__dropout": 0.0,
    "model__modalities__visual__encoder__dropout": 0.0,
    "model__modalities__audio__encoder__dropout": 0.0,
    "training__optim": "sgd",
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two JSONL files with 13 usable samples each, of text only and with one or two pictures; one picture is none."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(14):
        Image.new("L", (20, 20), 15 * number).save(folder / f"{number}.png")
    (folder / "4.png").write_bytes(b"no picture")
    for part in range(2):
        lines = []
        for number in range(14 - part):
            pictures = [number, 2 * number % 13 if number != 2 else 2][: (part or number) % 3]
            pictures = [one for one in pictures if one != 4 or number == 4]
            if part == 0 and number == 4:
                pictures = [4]
            elif part == 1:
                pictures = [one for one in pictures if one != 4]
            content = [{"type": "image", "image": f"{one}.png"} for one in pictures]
            content.append({"type": "text", "text": "Which digit is written? " * (1 + number % 4)})
            answer = {"role": "assistant", "content": "seven " * (1 + number % 3)}
            lines.append(
                json.dumps({"id": f"{part}-{number}", "messages": [{"role": "user", "content": content}, answer]})
            )
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    sources = [str(folder / "0.jsonl"), str(folder / "1.jsonl")]
    return {
        "data__train": sources,
        "data__train_size": None,
        "data__on_bad_media": "skip",
        "data__bad_media_budget": 0.1,
    }


@pytest.fixture(scope="module")
def opt(tmp_path_factory, tiny_tokenizer):
    """A folder with a tiny random OPT, whose attention sees past the beginning of a sample."""
    folder = tmp_path_factory.mktemp("opt")
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_attention_heads": 4}
    config = OPTConfig(**sizes, num_hidden_layers=2, max_position_embeddings=512, vocab_size=len(tiny_tokenizer))
    OPTForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def records(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in found if "loss" in r]


@pytest.mark.parametrize("how", ["grouped", "packed", "both"])
def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path, capsys, mixed, how, killed, same_adapter):
    """Interrupted in the middle of the second epoch or later, with data of several sources and a sample left out."""
    changes = {**SAME, **mixed, **(GROUPED if how != "packed" else {}), **(PACKED if how != "grouped" else {})}
    changes |= {"training__max_steps": 12, "training__per_device_train_batch_size": 2, "training__save_steps": 11}
    full = train(tmp_path / "full", **changes)
    said = capsys.readouterr().out
    if how != "grouped":
        assert "packing: 26 samples in " in said
        assert "stage 2: 2 packed rows a step" in said
    if how != "packed":
        assert "of a batch is padding" in said
    folder = killed(full, tmp_path / "killed", 11)
    lengths = (folder / "lengths-stage2.npz").stat().st_mtime_ns
    train(folder, **changes, resume=True)
    assert last_checkpoint(folder / "checkpoints/stage2")[1] == 12
    assert records(folder) == records(full)
    assert len(records(full)) == 12
    assert (folder / "lengths-stage2.npz").stat().st_mtime_ns == lengths  # read, not counted again
    same_adapter(folder, full)


def test_a_packed_epoch_learns_what_an_unpacked_one_does(train, tmp_path, mixed):
    """One step on all samples: the same loss, and the same adapter, in 26 rows of one sample or in a few."""
    found = {}
    for name, more in (("single", {"model__max_length": 96}), ("packed", PACKED)):
        changes = {**SAME, **mixed, **more, "training__max_steps": 1, "training__save_strategy": "no"}
        changes["training__per_device_train_batch_size"] = 26
        folder = train(tmp_path / name, **changes)
        found[name] = records(folder), load_file(folder / "adapter/adapter_model.safetensors")
    (single,), (packed,) = found["single"][0], found["packed"][0]
    assert packed == pytest.approx(single, rel=1e-5)
    for key, tensor in found["single"][1].items():
        torch.testing.assert_close(found["packed"][1][key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_pack_and_group_as_one(train, train_two, engine, tmp_path, losses, mixed):
    changes = {**SAME, **mixed, **GROUPED, **PACKED, "training__global_batch_size": 4}
    # The last step of an epoch may be short; on several processes accelerate fills it up from the first.
    changes["training__max_steps"] = 3
    one = train(tmp_path / "one", **changes)
    halves = {"training__per_device_train_batch_size": 1}
    done = train_two(tmp_path / "two", **changes, **halves)
    expected = {"processes": 2, "distributed_type": "MULTI_CPU", "wrapper": "DistributedDataParallel"}
    assert engine(tmp_path / "two").items() >= expected.items()
    assert done.stdout.count("packing: 26 samples in ") == 1
    assert len(losses(one)) == 3
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)


def test_a_backbone_that_reads_past_the_beginning_of_a_sample_is_refused(train, tmp_path, mixed, opt):
    changes = {**SAME, **mixed, "model__backbone": str(opt), "training__max_steps": 1}
    with pytest.raises(MokaError, match=r"packing: .* model_type 'opt'.* Take training.packing out"):
        train(tmp_path / "run", **changes, **PACKED)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", **changes, **GROUPED)
    assert len(records(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_backbone_in_parts_is_tried_on_all_processes(
    tiny_config, tmp_path, launch, write_yaml, write_zero, mixed, opt, engine
):
    changes = {**SAME, **mixed, **PACKED, "training__max_steps": 2, "training__optim": "adamw_torch"}
    changes["training__deepspeed"] = str(write_zero(tmp_path, "zero3"))
    good, bad = (
        write_yaml(tmp_path / f"{name}.yaml", tiny_config(tmp_path / name, **changes, **more))
        for name, more in (("good", {}), ("bad", {"model__backbone": str(opt)}))
    )
    done = launch("torchrun", "train", good)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"processes": 2, "distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 3}
    assert engine(tmp_path / "good").items() >= expected.items()
    assert len(records(tmp_path / "good")) == 2
    done = launch("torchrun", "train", bad)
    assert done.returncode != 0
    assert len(re.findall(r"moka: error: .* model_type 'opt'", done.stderr)) == 1, done.stderr[-3000:]
    assert not (tmp_path / "bad").exists()
