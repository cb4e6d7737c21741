"""A tuner for ms-swift (https://github.com/modelscope/ms-swift): MokA where LoRA would be.

    swift sft --external_plugins "$(python -c 'import moka.integrations as m; print(m.__path__[0])')/ms_swift.py" \\
        --tuner_type moka --lora_rank 8 --lora_alpha 16 --model Qwen/Qwen2.5-VL-3B-Instruct --dataset data.jsonl

Of ms-swift's settings it reads lora_rank, lora_alpha, lora_dropout, target_modules, modules_to_save and use_rslora. With
target_modules at its default, moka's own choice is used: the projections of the language model.
"""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

import moka


class _TemplateOfSwift:
    """Renders chats with ms-swift's own template, whose turns are others than those of the processor's."""

    modalities = ()

    def __init__(self, args: Any, processor: Any) -> None:
        self.template, self.tokenizer = args.get_template(processor), getattr(processor, "tokenizer", processor)

    def encode(self, messages: list[dict], add_generation_prompt: bool = False) -> dict[str, Any]:
        """Return ``input_ids`` of a chat of texts."""
        if not all(isinstance(message["content"], str) for message in messages):
            raise ValueError("texts only")
        self.template.set_mode("transformers" if add_generation_prompt else "train")
        return {"input_ids": list(self.template.encode({"messages": messages})["input_ids"])}


class MokaTuner(PeftTuner):
    """Adds a MokA adapter; saving and loading are those of peft."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """Return the peft model of ``model``.

        Args:
            args: ms-swift's ``SftArguments``.
        """
        targets = args.target_modules
        default = targets in (None, "all-linear") or list(targets) == ["all-linear"]
        processor = args.get_model_processor(load_model=False)[1]
        config = moka.MokaConfig.from_processor(
            processor,
            r=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=None if default else targets,
            modules_to_save=args.modules_to_save or None,
            use_rslora=args.use_rslora,
            turn_markers=moka.turn_markers(_TemplateOfSwift(args, processor)),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


tuners_map["moka"] = MokaTuner
