"""Tiny random vision-language models with real processors and small pictures, and the ids that a router must derive."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import moka

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
PLACEHOLDERS = ["<|image_pad|>", "<|video_pad|>", "<image>"]
WORDS = "which colour is this picture and that one red green blue grey it the user assistant system Be brief."

# The layout of Qwen2-VL's template, with the marks of an answer that assistant-only losses need.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endgeneration %}"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# With the default initializer_range of 0.02 a tiny random model hardly looks at its context.
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.1}
SIDE = 16  # pixels of a picture, 16 patches


class ImageQwenProcessor(tf.Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL without its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(
            tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
        )
        tf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self):
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "mm_token_type_ids"]


@pytest.fixture(scope="session")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL + PLACEHOLDERS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen_processor(tokenizer):
    pictures = tf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    )
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return ImageQwenProcessor(pictures, tokenizer, chat_template=template)


def llava_processor(tokenizer):
    pictures = tf.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
    )
    return tf.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )


def text_settings(tokenizer):
    settings = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_key_value_heads": 2, "bos_token_id": None}
    return {**SIZES, **settings, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def qwen_model(tokenizer):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    tower = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={**text_settings(tokenizer), "rope_parameters": rope},
            vision_config={**tower, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]},
            **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
        )
    )


def llava_model(tokenizer):
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**SIZES, num_hidden_layers=2, patch_size=4, image_size=SIDE),
            text_config=tf.LlamaConfig(**text_settings(tokenizer)),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
        )
    )


FAMILIES = {"qwen2_5_vl": (qwen_model, qwen_processor), "llava": (llava_model, llava_processor)}


@dataclass(frozen=True)
class Family:
    """A vision-language model: its processor, and how to build it with the same weights every time."""

    processor: tf.ProcessorMixin
    build: Callable[[], tf.PreTrainedModel]

    def ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False).input_ids

    def explicit(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the ids that a router must derive: of each token its type and, in users' turns, its turn's number."""
        image = input_ids == self.processor.image_token_id
        structure = torch.isin(input_ids, torch.tensor(self.ids("<|vision_start|><|vision_end|>")))
        opening, closing = self.ids("<|im_start|>user\n"), self.ids("<|im_end|>")
        groups = torch.zeros_like(input_ids)
        for row, tokens in enumerate(input_ids.tolist()):
            turn, inside = 0, False
            for i, token in enumerate(tokens):
                inside = inside and [token] != closing
                groups[row, i] = turn * inside
                if tokens[i + 1 - len(opening) : i + 1] == opening:
                    turn, inside = turn + 1, True
        return {"mm_token_type_ids": image.long(), "interaction_ids": groups.masked_fill(structure, 0)}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tokenizer):
    model, processor = FAMILIES[request.param]

    def build():
        torch.manual_seed(0)
        return model(tokenizer)

    return Family(processor(copy.deepcopy(tokenizer)), build)


@dataclass(frozen=True)
class Method:
    """A peft method: plain LoRA, for which every setup must work, and MokA."""

    name: str

    @property
    def dropout(self) -> str:
        return "lora_dropout" if self.name == "lora" else "dropout"

    def config(self, family: Family, **fields):
        if self.name == "lora":
            names = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
            settings = {"r": 4, "lora_alpha": 8, "target_modules": names, "task_type": "CAUSAL_LM"}
            return LoraConfig(**{**settings, "lora_dropout": 0.0, **fields})
        return moka.MokaConfig.from_processor(
            family.processor, **{"r": 4, "alpha": 8, "dropout": 0.0, "task_type": "CAUSAL_LM", **fields}
        )

    def attach(self, family: Family, **fields):
        """Return a new PeftModel whose adapter clearly changes the loss, as a trained one does."""
        return self.trained_(get_peft_model(family.build(), self.config(family, **fields)))

    def trained_(self, model, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if f"{self.name}_A.default" in name or f"{self.name}_B.default" in name:
                std = 0.3 if f"{self.name}_A" in name else 0.1
                parameter.data = torch.randn(parameter.shape, generator=generator) * std
        return model

    def weights(self, model, adapter: str = "default") -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in model.named_parameters() if f"{self.name}_" in n and adapter in n}

    def inputs(self, family: Family, batch: dict) -> dict:
        """Return ``batch`` with every id that a router would derive given explicitly; LoRA has no use for them."""
        ids = family.explicit(batch["input_ids"])
        return {**batch, **(ids if self.name == "moka" else {})}

    def visual_changed(self, before, after) -> bool:
        """Tell whether training changed A of the pictures' tokens (LoRA: A) in the first layer."""
        names = [name for name in before if f"{self.name}_A" in name and ".layers.0." in name]
        assert names
        row = 1 if self.name == "moka" else slice(None)
        return all(not torch.equal(before[name][row], after[name][row]) for name in names)


@pytest.fixture(scope="session", params=["lora", "moka"])
def method(request):
    return Method(request.param)


def picture(colour):
    image = Image.new("RGB", (SIDE, SIDE), colour)
    image.putpixel((3, 5), (255, 255, 255))
    return image


@pytest.fixture(scope="session")
def pictures():
    return [picture(colour) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 90))]
