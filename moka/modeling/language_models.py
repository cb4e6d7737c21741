"""The language model inside the composed one: any of `AutoModelForCausalLM`, or the decoder of a multimodal checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class QwenVLForCausalLM(Qwen2_5_VLPreTrainedModel, GenerationMixin):
    """The decoder and the head of a Qwen2.5-VL checkpoint, without its vision tower.

    Its tensors have the names that published checkpoints give them. The tower is an encoder of the composed model
    (``qwen2.5-vl``), so its weights are not held twice and no adapter is put into it by mistake.
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
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # [batch, kept, vocabulary]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if return_dict else result.to_tuple()


# By the `model_type` of the decoder: classes that `AutoModelForCausalLM` does not know.
DECODERS: dict[str, type[PreTrainedModel]] = {"qwen2_5_vl_text": QwenVLForCausalLM}


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text decoder: of a multimodal checkpoint its part, of a language model itself."""
    if config.model_type != "qwen2_5_vl":
        return config
    text_config = config.get_text_config()
    text_config.tie_word_embeddings = config.tie_word_embeddings
    return text_config


def load_language_model(backbone: str, **kwargs: Any) -> PreTrainedModel:
    """The language model of a folder or hub name; ``kwargs`` as for ``AutoModelForCausalLM.from_pretrained``."""
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    config = decoder_config(AutoConfig.from_pretrained(backbone, **hub))
    decoder = DECODERS.get(config.model_type)
    if decoder is None:
        return AutoModelForCausalLM.from_pretrained(backbone, **kwargs)
    # transformers 5 names the parts of a checkpoint otherwise in memory; a file may have either.
    renamed = {r"^model\.language_model\.": "model."}
    return decoder.from_pretrained(backbone, config=config, key_mapping=renamed, **kwargs)


def create_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a configuration, with random weights."""
    decoder = DECODERS.get(config.model_type)
    return AutoModelForCausalLM.from_config(config) if decoder is None else decoder._from_config(config)
