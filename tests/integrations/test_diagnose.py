"""``moka diagnose`` on Hugging Face models from their folders, with their own processors and picture files."""

import json

import pytest
import transformers as tf

import moka
from moka.cli.main import main
from moka.testing.tiny_mllms import tiny_model, tiny_processor, write_tiny_samples

COLOURS = ("red", "green", "blue", "grey")


@pytest.fixture
def questions(tmp_path, pictures):
    """A JSONL file of questions about pictures next to it; the last one's picture is damaged."""
    lines = []
    for i, colour in enumerate((*COLOURS, "red")):
        if i < len(COLOURS):
            pictures[i].save(tmp_path / f"{i}.png")
        else:
            (tmp_path / f"{i}.png").write_bytes(b"not a picture")
        asked = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "which colour is this picture"}]
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
        lines.append(json.dumps({"id": f"q{i}", "messages": chat}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "questions.jsonl"


def test_chats_of_a_model_without_an_adapter(family, questions, tmp_path, capsys):
    found = moka.diagnose(family.build().eval(), questions, processor=family.processor, progress=False, batch_size=3)
    assert (found.n, found.adapter, found.modalities) == (4, "none", ["visual"])
    assert [one["id"] for one in found.failed] == ["q4"]
    assert "4.png" in found.failed[0]["error"]
    one = moka.diagnose(family.build().eval(), questions, processor=family.processor, progress=False, batch_size=1)
    for a, b in zip(found.samples, one.samples, strict=True):
        for name, value in a["log_likelihood"]["tokens"].items():
            assert b["log_likelihood"]["tokens"][name] == pytest.approx(value, abs=1e-4)
    found.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") >= 4
    assert "MokA" in found.left_out["gradients"]


def test_the_command_on_a_folder(family, questions, tmp_path, capsys):
    if not isinstance(family.processor, tf.LlavaProcessor):
        pytest.skip("its processor is a class of the tests")
    family.build().save_pretrained(tmp_path / "model")
    family.processor.save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    assert main(["diagnose", str(tmp_path / "model"), "--data", str(questions), "--output", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["n"] == 4
    assert report["adapter"] == "none"
    assert "q4" in capsys.readouterr().out


def test_an_adapter_of_a_model_in_a_folder(family, method, questions, tmp_path):
    if not isinstance(family.processor, tf.LlavaProcessor):
        pytest.skip("its processor is a class of the tests")
    family.build().save_pretrained(tmp_path / "model")
    family.processor.save_pretrained(tmp_path / "model")
    model = method.attach(family)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    model.save_pretrained(tmp_path / "adapter")
    found = moka.diagnose(tmp_path / "adapter", questions, ablate=["tokens", "adapter"], progress=False)
    assert (found.n, found.adapter) == (4, {"moka": "MokA", "lora": "LORA"}[method.name])
    assert ("adapter" in found.contributions) == (method.name == "moka")
    expected = moka.diagnose(model.eval(), questions, processor=family.processor, progress=False)
    for a, b in zip(found.samples, expected.samples, strict=True):
        for name, value in b["log_likelihood"]["tokens"].items():
            assert a["log_likelihood"]["tokens"][name] == pytest.approx(value, abs=1e-4)


def test_a_model_with_pictures_and_sound_and_no_adapter(tmp_path):
    samples = write_tiny_samples("qwen2.5-omni", tmp_path, 6)
    model, processor = tiny_model("qwen2.5-omni"), tiny_processor("qwen2.5-omni")
    found = moka.diagnose(model, samples, processor=processor, ablate=["tokens", "blank"], progress=False)
    assert (found.n, found.adapter, found.modalities) == (6, "none", ["visual", "audio"])
    for ablation in ("tokens", "blank"):
        shares = found.contributions[ablation]["all"]["shapley"]
        assert set(shares) >= {"visual", "audio"}
    assert "MokA" in found.left_out["gradients"]
    found.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") >= 6
    assert page.count("data:audio") >= 1
