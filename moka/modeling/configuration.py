"""``MokaModelConfig``: what a composed model is made of, as JSON."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from moka.errors import MokaError, nearest

from .language_models import decoder_config

# The media a content part can be, and transformers' `mm_token_type_ids` for each.
MEDIA_TYPE_IDS = {"image": 1, "video": 2, "audio": 3}
DEFAULT_TYPE_IDS = {"visual": [1, 2], "audio": [3]}
MODALITY_FIELDS = ("encoder", "projector", "type_ids")


class MokaModelConfig(PreTrainedConfig):
    """Configuration of ``MokaForConditionalGeneration``.

    Args:
        text_config: configuration of the decoder-only language model, or of a checkpoint that has it (Qwen2.5-VL).
        modalities: name -> {"encoder": {...}, "projector": {...}, "type_ids": [...]}; see ``moka.modeling.encoders``
            and ``moka.modeling.projectors`` for the fields. ``type_ids`` are the values of ``mm_token_type_ids`` that
            this encoder serves (default: visual 1 and 2, audio 3).
        backbone: where the language model came from (a hub name, a folder, or ``embedded:...``).
        fill_token_id: an ordinary token that means a placeholder where only ordinary ids may go (the ids that
            ``generate`` returns and that its logits processors see).

    Placeholders have ids beyond the vocabulary (``vocab_size + type id - 1``): no token is added to the embedding table.
    """

    model_type = "moka"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        modalities: dict[str, dict] | None = None,
        backbone: str | None = None,
        fill_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        text_config = decoder_config(text_config)
        # The base class resets the attention implementation of sub-configurations it finds; set ours after it.
        super().__init__(**{**kwargs, "tie_word_embeddings": text_config.tie_word_embeddings})
        self.text_config = text_config
        self.modalities = check_modalities(modalities or {})
        self.backbone = backbone
        self.fill_token_id = fill_token_id

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def uses_grid_positions(self) -> bool:
        """Return whether the language model takes positions in time, height and width (M-RoPE)."""
        return "mrope_section" in (getattr(self.text_config, "rope_parameters", None) or {})

    def placeholder_id(self, type_id: int) -> int:
        """Token id of the placeholders with this ``mm_token_type_ids`` value."""
        return self.text_config.vocab_size + type_id - 1

    @property
    def image_token_id(self) -> int:
        return self.placeholder_id(MEDIA_TYPE_IDS["image"])

    @property
    def video_token_id(self) -> int:
        return self.placeholder_id(MEDIA_TYPE_IDS["video"])

    @property
    def audio_token_id(self) -> int:
        return self.placeholder_id(MEDIA_TYPE_IDS["audio"])

    @property
    def type_ids(self) -> dict[str, list[int]]:
        """Modality name -> the values of ``mm_token_type_ids`` it serves."""
        return {name: spec["type_ids"] for name, spec in self.modalities.items()}


def check_modalities(modalities: dict[str, dict]) -> dict[str, dict]:
    """Validate and complete the ``modalities`` section; each mistake is a ``MokaError`` that names the field."""
    complete: dict[str, dict] = {}
    owner: dict[int, str] = {}
    for name, spec in modalities.items():
        if not isinstance(spec, dict):
            raise MokaError(f"modalities.{name}: {spec!r} is no mapping; give one with {', '.join(MODALITY_FIELDS)}.")
        for key in spec:
            if key not in MODALITY_FIELDS:
                allowed = ", ".join(MODALITY_FIELDS)
                raise MokaError(
                    f"modalities.{name}: unknown key {key!r}; known: {allowed}.{nearest(key, MODALITY_FIELDS)}"
                )
        for key in ("encoder", "projector"):
            if not isinstance(spec.get(key), dict) or "type" not in spec[key]:
                others = [other for other in (*modalities, *DEFAULT_TYPE_IDS) if other != name]
                raise MokaError(
                    f"modalities.{name}.{key}: needs a mapping with a 'type'; got {spec.get(key)!r}.{nearest(name, others)}"
                )
        type_ids = spec.get("type_ids") or DEFAULT_TYPE_IDS.get(name)
        if not type_ids or not isinstance(type_ids, (list, tuple)):
            raise MokaError(
                f"modalities.{name}.type_ids: {type_ids!r}; name the mm_token_type_ids it serves, for example [4]."
            )
        type_ids = list(type_ids)
        for i in type_ids:
            if type(i) is not int or i < 1 or i in owner:
                raise MokaError(f"modalities.{name}.type_ids: {i!r} must be an integer >= 1 used once; taken: {owner}.")
            owner[i] = name
        complete[name] = {"encoder": dict(spec["encoder"]), "projector": dict(spec["projector"]), "type_ids": type_ids}
    return complete
