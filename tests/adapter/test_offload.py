"""accelerate's offloading: weights that are on no device between the calls of their modules."""

import copy

import accelerate
import pytest
import torch
from peft import PeftModel

NEW = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def run(model, batch):
    with torch.no_grad():
        logits = model(**batch.kwargs()).logits
        out = model.generate(**batch.kwargs(), **NEW)
    return logits, out.sequences, torch.stack(out.logits)


def cpu_offload(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offload(model, folder):
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def dispatch(model, folder):
    """The first block stays, the second is on disk, the rest offloaded to the memory."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    device_map = {prefix + name: place for name, place in places.items()}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


def offloaded(model):
    return [name for name, parameter in model.named_parameters() if parameter.is_meta and ".moka_" in name]


@pytest.mark.filterwarnings("ignore:Current model requires")
@pytest.mark.parametrize("settings", [{}, {"share_b": False}, {"scale_position": "input"}], ids=str)
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, dispatch])
@pytest.mark.parametrize("full", [True, False], ids=["peft model", "base model"])
def test_offloaded_weights_change_no_output(tiny, batch, tmp_path, offload, full, settings):
    model = tiny.adapted(**settings)
    expected = run(model, batch)
    offload(model if full else model.get_base_model(), tmp_path)
    assert offloaded(model)
    for found, value in zip(run(model, batch), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
    assert offloaded(model)  # they are gone again


def test_an_adapter_loaded_onto_an_offloaded_backbone(tiny, batch, tmp_path):
    model = tiny.adapted()
    model.save_pretrained(tmp_path / "adapter")
    expected = run(copy.deepcopy(model), batch)
    base = tiny.backbone()
    dispatch(base, tmp_path / "weights")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for found, value in zip(run(loaded, batch), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
