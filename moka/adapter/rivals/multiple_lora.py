"""Multiple LoRA: as many LoRAs as modalities, and every token goes through all of them.

    y_t += s sum_k B_k A_k x_t,    k = 1 ... N

"Simply increasing the number of low-rank matrices". Equal to one LoRA of rank N r, but for its scale and initialisation.
Source: the MokA paper, section 4.1 and table 1, https://arxiv.org/abs/2506.05191.
"""

from .base import Rival


class MultipleLora(Rival):
    name = "multiple_lora"

    def counts(self, modalities: int) -> tuple[int, int, int]:
        return modalities, modalities, 0
