"""The language model inside the composed one: any of `AutoModelForCausalLM`, or the decoder of a multimodal checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel

from moka.adapter.inputs import CACHE, cache_of
from moka.errors import MokaError, counted

# Files of which a folder with a tokenizer has at least one.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_BACKBONES = "a folder of a causal language model, a hub name that this machine can reach, or embedded:smollm2-135m"
_LFS = b"version https://git-lfs"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class QwenVLForCausalLM(Qwen2_5_VLPreTrainedModel, GenerationMixin):
    """The decoder and the head of a Qwen2.5-VL checkpoint, without its vision tower.

    Its tensors have the names that published checkpoints give them. The tower is an encoder of the composed model
    (``qwen2.5-vl``), so its weights are not loaded twice and no adapter is put into it by mistake.
    """

    config: Qwen2_5_VLTextConfig  # type: ignore[assignment]
    config_class = Qwen2_5_VLTextConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected = [r"^visual\.", r"^model\.visual\."]

    def __init__(self, config: Qwen2_5_VLTextConfig) -> None:
        super().__init__(config)
        self.model = Qwen2_5_VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """As any causal language model; ``position_ids`` [batch, seq] for text, or [3, batch, seq] (``grid_positions``)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache_of({"past_key_values": past_key_values, "cache": kwargs.pop("cache", None)}), **kwargs},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # [batch, kept, vocabulary]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )
        return result if return_dict else result.to_tuple()


# By the `model_type` of the decoder: classes that `AutoModelForCausalLM` does not know.
DECODERS: dict[str, type[PreTrainedModel]] = {"qwen2_5_vl_text": QwenVLForCausalLM}


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the text decoder: of a multimodal checkpoint its part, of a language model itself."""
    if config.model_type != "qwen2_5_vl":
        return config
    text_config = config.get_text_config()
    text_config.tie_word_embeddings = config.tie_word_embeddings
    return text_config


@contextmanager
def loading_errors(what: str, name: str, expected: str = "") -> Iterator[None]:
    """Turn whatever goes wrong in loading a model, a configuration or a tokenizer into one clear error.

    Args:
        what: the setting that names it, such as "model.backbone".
        name: its value, a folder or a hub name.
        expected: what to give instead; default: a causal language model.
    Raises:
        MokaError: the folder has no model, is damaged, or has code of its own, which is never run.
    """
    try:
        yield
    except MokaError:
        raise
    except (
        Exception
    ) as error:  # of files, JSON, safetensors, tokenizers, and of what transformers makes of wrong values
        reason = " ".join(str(error).split()) or type(error).__name__
        folder = Path(name)
        if "trust_remote_code" in reason:
            reason = "its configuration names code of its own (auto_map), which moka never runs"
        elif folder.is_dir() and (pointer := _lfs_pointer(folder)):
            reason = f"{pointer} is a pointer of git-lfs and not the file; run `git lfs pull`"
        elif (folder / "adapter").is_dir():
            reason = "it is a run of `moka train`, and not a language model"
        else:
            reason = reason[:300]
        raise MokaError(
            f"{what}: {name!r} cannot be loaded: {reason.rstrip('.')}. Give {expected or _BACKBONES}."
        ) from error


def _lfs_pointer(folder: Path) -> str | None:
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("tokenizer*")):
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                return path.name
    return None


def load_tokenizer(folder: str | Path, what: str = "model.backbone", name: str | None = None) -> Any:
    """Load a tokenizer; transformers makes an empty one of a folder whose tokenizer was lost.

    Raises:
        MokaError: it cannot be loaded, or its files are not there.
    """
    path, name = Path(folder), name or str(folder)
    if path.is_dir() and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise MokaError(
            f"{what}: {name!r} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). Copy the folder again."
        )
    with loading_errors(what, name):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_config(backbone: str | Path, **hub: Any) -> PreTrainedConfig:
    """Load the configuration of a language model, without running code of its own."""
    return AutoConfig.from_pretrained(backbone, trust_remote_code=False, **hub)


def load_language_model(backbone: str, **kwargs: Any) -> PreTrainedModel:
    """Load the language model of a folder or hub name; ``kwargs`` as for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        MokaError: its file lacks tensors, which would stay random.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    config = decoder_config(load_config(backbone, **hub))
    decoder: Any = DECODERS.get(config.model_type)
    if decoder is None:
        decoder, kwargs = AutoModelForCausalLM, {**kwargs, "trust_remote_code": False}
    else:
        # transformers 5 names the parts of a checkpoint otherwise in memory; a file may have either.
        kwargs = {**kwargs, "config": config, "key_mapping": {r"^model\.language_model\.": "model."}}
    model, found = decoder.from_pretrained(backbone, output_loading_info=True, **kwargs)
    lost = sorted(found["missing_keys"])
    if lost:
        raise MokaError(
            f"{backbone}: its files lack {counted(len(lost), 'tensor')} of {type(model).__name__} ({lost[0]}, ...), which would "
            "stay random. Copy the folder again; config.json and weights must be of one model."
        )
    return model


def create_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Create the language model of a configuration, with random weights."""
    decoder = DECODERS.get(config.model_type)
    return AutoModelForCausalLM.from_config(config) if decoder is None else decoder._from_config(config)
