"""Ask a trained model about your own media; the answer is printed on standard output.

moka generate runs/quickstart --image digit.png --audio digit.wav "What is the sum of both digits?"
"""

from __future__ import annotations

import argparse

import transformers

import moka
from moka.data.media_io import file_problem
from moka.errors import MokaError
from moka.inference import AS_TRAINED, DECODINGS
from moka.modeling.quantization import QUANTIZATIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder of `moka train`, or an adapter folder")
    parser.add_argument("question")
    for kind in ("image", "audio", "video"):
        parser.add_argument(f"--{kind}", action="append", metavar="FILE", help=f"{kind} file; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens (default 64)")
    parser.add_argument("--num-beams", type=int, default=1, help="beam search with that many beams (default 1: greedy)")
    parser.add_argument(
        "--decoding",
        choices=DECODINGS,
        default=DECODINGS[0],
        help="fork-merge: the first layers see pictures and sound apart (arXiv 2505.20873); the prompt needs both. "
        "entropy-fusion: of forwards with one modality each (MLA, arXiv 2311.10707)",
    )
    parser.add_argument("--fork-layers", type=int, metavar="N", help="of fork-merge: how many (default: a quarter)")
    parser.add_argument(
        "--visual-weight", type=float, default=0.5, metavar="W", help="of fork-merge: 0 sound only, 1 pictures only"
    )
    parser.add_argument("--backbone", metavar="FOLDER", help="where the language model is, if not where it was trained")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add_quantization(parser)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Also of `moka eval`."""
    parser.add_argument(
        "--quantization", choices=["none", *QUANTIZATIONS], help="how to hold the backbone (default: as in training)"
    )


def quantization(arguments: argparse.Namespace) -> str | None:
    """Return what ``moka.load`` takes."""
    return {None: AS_TRAINED, "none": None}.get(arguments.quantization, arguments.quantization)


def run(arguments: argparse.Namespace) -> None:
    transformers.utils.logging.disable_progress_bar()
    # Loading a model takes seconds; a wrong path is reported before.
    for path in [*(arguments.image or []), *(arguments.audio or []), *(arguments.video or [])]:
        problem = file_problem(path)
        if problem:
            raise MokaError(f"{path}: {problem}")
    loaded = moka.load(
        arguments.run, device=arguments.device, backbone=arguments.backbone, quantization=quantization(arguments)
    )
    answer = loaded.generate(
        arguments.question,
        image=arguments.image,
        audio=arguments.audio,
        video=arguments.video,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        decoding=arguments.decoding,
        fork_layers=arguments.fork_layers,
        visual_weight=arguments.visual_weight,
    )
    print(answer)
