"""The methods that the MokA paper and its successors compare with, as adapters of the same peft method and configuration.

``MokaConfig(method=NAME)``: layers, routing, saving, checkpointing and merging are MokA's own; a method says only how the low-rank
activations of a token are mixed. Methods that are settings of MokA are presets of `MokaConfig`; LoRA and DoRA are peft's own.
"""

from .base import Rival
from .hydralora import HydraLora
from .imod import IMoD
from .loramoe import LoraMoE
from .multiple_lora import MultipleLora
from .uni_mm_lora import UniMMLora
from .uni_mm_lora_gate import UniMMLoraGate

RIVALS: dict[str, Rival] = {
    rival.name: rival for rival in (MultipleLora(), LoraMoE(), HydraLora(), UniMMLora(), UniMMLoraGate(), IMoD())
}

__all__ = ["RIVALS", "Rival"]
