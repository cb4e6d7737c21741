"""Exports equal what was trained, as far as the format allows, and prove it before they appear."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import moka
from moka.adapter.layer import MokaLinear, StackedWeight
from moka.demo.digit_tasks import EmbeddedTask
from moka.errors import MokaError
from moka.export import export, formats, verify
from moka.inference import load_base

FORMATS = ["text-merged", "hf-backbone", "lora"]
IDS = torch.tensor([[5, 9, 120, 33, 7, 250], [8, 8, 301, 12, 4, 2]])


@pytest.fixture
def run(make_run):
    return make_run()


def logits(loaded, count=3):
    """Of chats with media, padded on the left, at tokens that are no padding."""
    task = EmbeddedTask("audio-visual-text", "test", size=count)
    chats = [sample["messages"][:1] for sample in (task[i] for i in range(count))]
    chats.append([{"role": "user", "content": "Which digit is written? " * 3}])
    batch = loaded.processor(chats)
    batch.pop("labels")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        return loaded.model(**batch).logits[batch["attention_mask"].bool()]


def text_logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def refused(*arguments, **settings):
    with pytest.raises(MokaError) as caught:
        export(*arguments, **settings)
    return str(caught.value)


VARIANTS = {
    "plain": {},
    "own B": {"share_b": False},
    "input": {"scale_position": "input", "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 5.5},
        "use_rslora": True,
    },
    "text only": {"adapt": ["text"]},
    "two": {"adapt": ["text", "audio"], "interaction": "reversed"},
}


@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_run_answers_as_the_live_one_with_media(make_run, tmp_path, variant, backbone):
    run = make_run(backbone=backbone, **VARIANTS[variant])
    live = moka.load(run)
    report = export(run, tmp_path / "out")
    assert report.changed == report.expected == 6
    assert report.largest_difference < 1e-4
    assert report.lost == []
    shutil.move(tmp_path / "out", tmp_path / "moved")
    merged = moka.load(tmp_path / "moved")
    close(logits(merged), logits(live))
    with live.model.disable_adapter():
        assert (logits(live) - logits(merged)).abs().max() > 0.01  # the adapter matters
    question = {"question": "Which digit?", "image": picture()}
    assert merged.generate(**question, max_new_tokens=8) == live.generate(**question, max_new_tokens=8)


def test_all_numbers_are_in_the_folder(trained_run, tmp_path):
    report = export(trained_run, tmp_path / "out")
    description = json.loads((tmp_path / "out/export.json").read_text())
    assert description["kind"] == "text-merged"
    assert set(description["versions"]) == {"moka", "torch", "transformers", "peft"}
    assert description["checks"]["modules_changed"] == 4
    assert description["checks"]["largest_difference"] == report.largest_difference
    assert set(report.differences) == {"random text", "random visual", "random audio", "random media of all kinds"}
    model = json.loads((tmp_path / "out/adapter/moka_model.json").read_text())
    assert model["backbone"] == "../backbone"
    folded = load_base(tmp_path / "out")
    assert (
        folded.backbone_fingerprint() == model["backbone_fingerprint"] != load_base(trained_run).backbone_fingerprint()
    )
    assert "4 / 4" in (tmp_path / "out/README.md").read_text()
    assert report.bytes > 100_000
    assert not (tmp_path / "out.part").exists()


def picture():
    parts = EmbeddedTask("audio-visual-text", "test", size=1)[0]["messages"][0]["content"]
    return next(part["image"] for part in parts if part["type"] == "image")


def test_decoding_does_no_adapter_work(run, tmp_path, monkeypatch):
    export(run, tmp_path / "out")
    steps = set()  # lengths of the forwards in which an adapter computed something
    forward, read = MokaLinear.forward, StackedWeight.forward
    running = []  # the length of the layer's input

    def watched(self, x, *args, **kwargs):
        running.append(x.shape[1])
        try:
            return forward(self, x, *args, **kwargs)
        finally:
            running.pop()

    # A layer that adds something reads its A and B; for decoded tokens they are read once and kept.
    monkeypatch.setattr(MokaLinear, "forward", watched)
    monkeypatch.setattr(StackedWeight, "forward", lambda self: steps.add(running[-1]) or read(self))
    for place, busy in ((run, True), (tmp_path / "out", False)):
        loaded = moka.load(place)
        steps.clear()
        loaded.generate("Which digit is it?", image=picture(), max_new_tokens=4, min_new_tokens=4)
        assert (1 in steps) == busy
        assert max(steps) > 1  # the picture
        steps.clear()
        loaded.generate("Which digit is it?", max_new_tokens=3)
        assert bool(steps) == busy


def test_adapter_without_its_backbone_is_reported(run, tmp_path):
    export(run, tmp_path / "out")
    shutil.copytree(tmp_path / "out/adapter", tmp_path / "single")
    with pytest.raises(MokaError, match="moved in full"):
        moka.load(tmp_path / "single")
    assert moka.load(tmp_path / "single", backbone=str(tmp_path / "out/backbone"))
    with pytest.raises(MokaError, match="fingerprint"):
        moka.load(tmp_path / "out", backbone=str(load_base(run).config.backbone))


@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
def test_bare_backbone_has_the_text_path(make_run, tmp_path, backbone):
    run = make_run(backbone=backbone)
    report = export(run, tmp_path / "out", "hf-backbone")
    live = moka.load(run)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(text_logits(model), text_logits(live.model))
    tied = backbone == "llama"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert set(report.losses) == {"random visual", "random audio", "random media of all kinds"}
    assert min(report.losses.values()) > 1e-3
    assert any("encoders and projectors of visual, audio" in lost for lost in report.lost)
    assert "interaction" in (tmp_path / "out/README.md").read_text()
    # The prompt of training, and its end of an answer.
    chat = [{"role": "user", "content": "Which digit?"}]
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(chat, add_generation_prompt=True)
    assert prompt["input_ids"] == live.processor.encode(chat, add_generation_prompt=True)["input_ids"]
    stops = model.generation_config.eos_token_id
    assert live.processor.end_token_id in (stops if isinstance(stops, list) else [stops])
    with pytest.raises(MokaError, match="hf-backbone, which needs no moka"):
        moka.load(tmp_path / "out")


LOADS_WITHOUT_MOKA = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
backbone, folder, result = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), folder).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.tensor({IDS.tolist()})).logits, result)
assert "moka" not in sys.modules
"""


def test_stock_peft_loads_the_lora_without_moka(make_run, backbones, tmp_path):
    run = make_run(**VARIANTS["patterns"])
    export(run, tmp_path / "out", "lora")
    # Isolated: the working directory is not on the path, so that moka is not even found by chance.
    arguments = [str(backbones["llama"]), str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", LOADS_WITHOUT_MOKA, *arguments], check=True, cwd="/"
    )
    close(torch.load(tmp_path / "logits.pt"), text_logits(moka.load(run).model))


@pytest.mark.parametrize("modality", ["text", "visual", "audio"])
@pytest.mark.parametrize("variant", ["plain", "own B", "input", "patterns"])
def test_lora_is_one_path_of_the_adapter(make_run, backbones, tmp_path, variant, modality):
    run = make_run(**VARIANTS[variant])
    report = export(run, tmp_path / "out", "lora", modality=modality)
    assert report.changed == report.expected == 6
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbones["llama"]), str(tmp_path / "out"))
    live = moka.load(run)
    # The live layers with every token of that modality, in no interaction.
    types = torch.full_like(IDS, {"text": 0, "visual": 1, "audio": 3}[modality])
    with torch.no_grad():
        routed = live.model.get_base_model().language_model(input_ids=IDS, mm_token_type_ids=types).logits
    close(text_logits(model), routed)
    differs = (text_logits(model) - text_logits(live.model)).abs().max() > 0.01
    assert bool(differs) == (modality != "text")
    assert ("random text" in report.losses) == (modality != "text")
    assert any(f"every token goes through the {modality} path" in lost for lost in report.lost)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors)
    config = LoraConfig.from_pretrained(tmp_path / "out")
    assert config.target_modules == {"q_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_the_other_way_round(make_run, tiny_tokenizer, tmp_path, format):
    """GPT-2's Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_positions=512, n_embd=64, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    run = make_run(folder=tmp_path / "gpt2", target_modules=r"language_model\..*\.(?:c_attn|c_proj)")
    report = export(run, tmp_path / "out", format)
    assert report.changed == report.expected == 3
    assert report.largest_difference < 1e-5


def test_layers_chosen_by_place_are_named_by_path(make_run, tmp_path):
    run = make_run(target_modules=r"language_model\.model\.layers\.1\..*\.(?:q_proj|up_proj)")
    assert export(run, tmp_path / "out", "lora").changed == 2
    config = LoraConfig.from_pretrained(tmp_path / "out")
    assert config.target_modules == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}


def test_modality_without_text_leaves_as_lora_only(make_run, tmp_path):
    run = make_run(adapt=["visual"])
    for format in ("text-merged", "hf-backbone", "lora"):
        message = refused(run, tmp_path / "out", format)
        assert "leaves text tokens only" in message
        assert "--modality visual" in message
    assert "leaves audio tokens only" in refused(run, tmp_path / "out", "lora", modality="audio")
    assert export(run, tmp_path / "out", "lora", modality="visual").changed == 6


@pytest.mark.parametrize("format", ["hf-backbone", "lora"])
def test_plain_lora_run_loses_no_path(make_run, tmp_path, format):
    run = make_run(method=LoraConfig)
    report = export(run, tmp_path / "out", format)
    assert report.changed == report.expected == 6
    assert report.losses == {}
    assert len(report.differences) == 4
    assert max(report.differences.values()) < 1e-4


def test_plain_lora_run_does_not_split(make_run, tmp_path):
    run = make_run(method=LoraConfig)
    message = refused(run, tmp_path / "out")
    assert "plain LoRA" in message
    assert "--format hf-backbone" in message
    assert "plain LoRA" in refused(run, tmp_path / "out", "lora", modality="visual")


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16(run, tmp_path, format):
    report = export(run, tmp_path / "out", format, dtype="bfloat16")
    assert report.changed == report.expected == 6
    assert report.largest_difference <= 2e-2
    assert json.loads((tmp_path / "out/export.json").read_text())["dtype"] == "bfloat16"
    if format == "text-merged":
        assert load_file(tmp_path / "out/backbone/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["text-merged", "lora"])
def test_quantised_backbone_is_written_unquantised(make_run, backbones, tmp_path, format):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        backbones["llama"], quantization_config=config, device_map="cpu"
    ).save_pretrained(tmp_path / "q4")
    AutoTokenizer.from_pretrained(backbones["llama"]).save_pretrained(tmp_path / "q4")
    run = make_run(folder=tmp_path / "q4")
    report = export(run, tmp_path / "out", format)
    assert report.changed == report.expected == 6
    if format == "text-merged":
        assert "quantization" not in (tmp_path / "out/backbone/config.json").read_text()
        live = moka.load(run, dequantize=True)
        close(logits(moka.load(tmp_path / "out")), logits(live))


# Verification catches damage.


def gone(tmp_path):
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("format", ["text-merged", "hf-backbone"])
def test_fold_that_changes_nothing_is_caught(run, tmp_path, monkeypatch, format):
    monkeypatch.setattr(MokaLinear, "merge", lambda self, **how: None)
    assert "has the weight from before" in refused(run, tmp_path / "out", format)
    gone(tmp_path)


def spoil(monkeypatch, change):
    """``change(folder)`` between writing and verifying."""
    write = formats.write

    def wrong(source, folder):
        write(source, folder)
        change(folder)

    monkeypatch.setattr(formats, "write", wrong)


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


LAYER = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("format", "file", "change", "words"),
    [
        ("text-merged", "backbone/model.safetensors", lambda t: t[f"{LAYER}.q_proj.weight"].mul_(1.01), "fingerprint"),
        (
            "text-merged",
            "backbone/model.safetensors",
            lambda t: t[f"{LAYER}.q_proj.weight"][1, 1].add_(0.1),
            "plus the text",
        ),
        (
            "text-merged",
            "adapter/adapter_model.safetensors",
            lambda t: next(tensor for key, tensor in t.items() if "moka_A" in key)[1].add_(0.5),
            "logits for random visual",
        ),
        (
            "text-merged",
            "adapter/adapter_model.safetensors",
            lambda t: t.pop(next(key for key in t if "projectors.audio" in key)),
            "lack",
        ),
        ("hf-backbone", "model.safetensors", lambda t: t[f"{LAYER}.k_proj.weight"].mul_(1.01), "no adapted weight"),
        ("hf-backbone", "model.safetensors", lambda t: t.pop(f"{LAYER}.q_proj.weight"), "q_proj"),
        (
            "lora",
            "adapter_model.safetensors",
            lambda t: t[f"base_model.model.{LAYER}.q_proj.lora_B.weight"].mul_(2),
            "is not the text path",
        ),
        (
            "lora",
            "adapter_model.safetensors",
            lambda t: t.pop(f"base_model.model.{LAYER}.q_proj.lora_B.weight"),
            "is not the text path",
        ),
    ],
)
def test_tensors_changed_on_the_way_are_caught(run, tmp_path, monkeypatch, format, file, change, words):
    spoil(monkeypatch, lambda folder: edit_tensors(folder / file, change))
    message = refused(run, tmp_path / "out", format)
    assert "failed its verification" in message
    assert words in message
    assert ".part" not in message
    gone(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_truncated_files_are_caught(run, tmp_path, monkeypatch, format, name):
    def cut(folder):
        path = next(path for path in sorted(folder.rglob(f"*{name}")) if "tokenizer" not in path.name)
        path.write_bytes(path.read_bytes()[:100])

    spoil(monkeypatch, cut)
    assert "failed its verification" in refused(run, tmp_path / "out", format)
    gone(tmp_path)


def test_wrong_scale_of_a_lora_is_caught(run, tmp_path, monkeypatch):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] + 1}))

    spoil(monkeypatch, change)
    assert "is not the text path" in refused(run, tmp_path / "out", "lora")


def test_logits_are_compared_even_when_weights_agree(run, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_compare_weights", lambda *args: None)
    spoil(
        monkeypatch,
        lambda folder: edit_tensors(folder / "model.safetensors", lambda t: t["model.norm.weight"].mul_(1.001)),
    )
    assert "logits for random text differ" in refused(run, tmp_path / "out", "hf-backbone")
    gone(tmp_path)


# Bad input.


@pytest.mark.parametrize("format", FORMATS)
def test_adapter_that_learned_nothing_is_refused(make_run, tmp_path, format):
    run = make_run(init_weights=True)
    assert "is zero" in refused(run, tmp_path / "out", format)
    gone(tmp_path)


def test_tied_weight_is_not_folded(make_run, tmp_path):
    run = make_run(target_modules=r"language_model\.(?:lm_head|.*\.q_proj)")
    for format in ("text-merged", "hf-backbone"):
        assert "lm_head: this weight is tied" in refused(run, tmp_path / "out", format)
    untied = make_run("untied", backbone="qwen2", target_modules=r"language_model\.(?:lm_head|.*\.q_proj)")
    assert export(untied, tmp_path / "out").changed == 3


def test_places_that_are_taken_are_refused(run, tmp_path):
    out = tmp_path / "out"
    adapter = run / "adapter"
    for output in (adapter / "merged", adapter, run, tmp_path):
        assert f"--output: {output} is {adapter}, has it or is inside it" in refused(run, output, overwrite=True)
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(run, tmp_path / "file")
    assert "is a file" in refused(run, tmp_path / "file/out")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        assert "is not empty and has no earlier result" in refused(run, out, overwrite=overwrite)
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    export(run, out, "lora")
    assert "--overwrite" in refused(run, out, "hf-backbone")
    export(run, out, "hf-backbone", overwrite=True)
    assert not (out / "adapter_config.json").exists()


def test_failed_replacement_leaves_the_old_export(run, tmp_path, monkeypatch):
    export(run, tmp_path / "out", "lora")
    before = (tmp_path / "out/export.json").read_text()
    spoil(monkeypatch, lambda folder: (folder / "adapter_model.safetensors").unlink())
    refused(run, tmp_path / "out", "lora", overwrite=True)
    assert (tmp_path / "out/export.json").read_text() == before


def test_exports_are_no_runs(run, tmp_path):
    for format in FORMATS:
        export(run, tmp_path / format, format)
        assert "is an export already" in refused(tmp_path / format, tmp_path / "again")
    assert "is an export already" in refused(tmp_path / "text-merged/adapter", tmp_path / "again")


def test_what_is_unknown_is_reported(run, trained_run, tmp_path):
    assert "Did you mean 'lora'?" in refused(run, tmp_path / "out", "loar")
    assert "none of the adapter's: text, visual, audio" in refused(run, tmp_path / "out", "lora", modality="image")
    assert "goes with the format lora" in refused(run, tmp_path / "out", modality="visual")
    assert "does not exist" in refused(tmp_path / "none", tmp_path / "out")
    assert "float32" in refused(run, tmp_path / "out", dtype="float16")
    assert "/no/such" in refused(run, tmp_path / "out", backbone="/no/such")
    assert "no.jsonl" in refused(run, tmp_path / "out", samples=tmp_path / "no.jsonl")


def test_biases_have_no_place_in_a_lora(make_run, tmp_path):
    run = make_run(backbone="qwen2", bias="all")
    assert "bias='all'" in refused(run, tmp_path / "out", "lora")
    export(run, tmp_path / "out", "hf-backbone")


def test_run_and_adapter_folder_and_live_model_stay_as_they_were(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for format in FORMATS:
        export(run / "adapter", tmp_path / format, format)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
