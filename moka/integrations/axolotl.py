"""A plug-in for axolotl (https://github.com/axolotl-ai-cloud/axolotl): MokA where LoRA would be.

    plugins: [moka.integrations.axolotl.MokaPlugin]
    adapter: moka
    lora_r: 8
    lora_alpha: 16

Of axolotl's settings it reads lora_r, lora_alpha, lora_dropout, lora_target_modules, lora_modules_to_save, peft_use_rslora and
lora_model_dir. Without lora_target_modules, moka's own choice is used: the projections of the language model.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders import load_processor, load_tokenizer
from axolotl.utils.chat_templates import get_chat_template_from_config
from peft import PeftModel, get_peft_model

import moka
from moka.errors import MokaError

# LoRA's settings that would change the adapter and that MokA does not have.
_OTHERS = (
    "lora_target_linear",
    "lora_target_parameters",
    "lora_exclude_modules",
    "lora_fan_in_fan_out",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "peft_layers_to_transform",
    "peft_use_dora",
    "peft_init_lora_weights",
    "peft_layer_replication",
    "peft_trainable_token_indices",
    "loraplus_lr_ratio",
    "relora",
    "sample_packing",
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
)


class MokaPlugin(BasePlugin):
    """Adds a MokA adapter for ``adapter: moka``; saving and loading are those of peft."""

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return the name under which axolotl accepts the adapter."""
        return [AdapterCapabilities(name="moka")]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Return the peft model of ``model`` and its configuration; None for another adapter.

        Args:
            config_only: no model, for trainers that add the adapter themselves (DPO).
        Raises:
            MokaError: a setting of LoRA that MokA does not have.
        """
        if cfg.adapter != "moka":
            return None
        unknown = [name for name in _OTHERS if cfg.get(name)]
        if unknown:
            raise MokaError(f"axolotl: {', '.join(unknown)} is not possible with adapter: moka; remove it.")
        config = _config(cfg)
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return loaded, loaded.peft_config["default"]
        adapted = get_peft_model(model, config)
        adapted.print_trainable_parameters()
        return adapted, config


def _config(cfg: Any) -> moka.MokaConfig:
    tokenizer = load_tokenizer(cfg)
    processor = load_processor(cfg, tokenizer=tokenizer) if cfg.is_multimodal or cfg.processor_type else tokenizer
    # The turns are those that axolotl renders, which need not be the processor's.
    if cfg.chat_template:
        processor.chat_template = get_chat_template_from_config(cfg, tokenizer=tokenizer)
    return moka.MokaConfig.from_processor(
        processor,
        r=cfg.lora_r,
        alpha=cfg.lora_alpha,
        dropout=cfg.lora_dropout or 0.0,
        target_modules=cfg.lora_target_modules or None,
        modules_to_save=cfg.lora_modules_to_save or None,
        use_rslora=bool(cfg.peft_use_rslora),
        task_type="CAUSAL_LM",
    )
