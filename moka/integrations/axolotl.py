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
from peft import PeftModel, get_peft_model
from transformers import AutoProcessor

import moka


class MokaPlugin(BasePlugin):
    """Registers ``adapter: moka``."""

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return that the name is known; restarts of ReLoRA are not supported."""
        return [AdapterCapabilities(name="moka")]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Return the peft model and its configuration, or None if the run uses another adapter."""
        if cfg.adapter != "moka":
            return None
        processor = AutoProcessor.from_pretrained(cfg.processor_config or cfg.tokenizer_config or cfg.base_model)
        config = moka.MokaConfig.from_processor(
            processor,
            r=cfg.lora_r or 8,
            alpha=cfg.lora_alpha or 16,
            dropout=cfg.lora_dropout or 0.0,
            target_modules=cfg.lora_target_modules or None,
            modules_to_save=cfg.lora_modules_to_save or None,
            use_rslora=bool(cfg.peft_use_rslora),
            task_type="CAUSAL_LM",
        )
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config
