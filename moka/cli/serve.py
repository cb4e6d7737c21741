"""Serve trained models over HTTP, as OpenAI's chat completions.

  moka serve runs/quickstart                               http://127.0.0.1:8000/v1, the model's name is quickstart
  moka serve digits=runs/quickstart photos=runs/photos     two models by name; one backbone is kept once
  moka serve runs/quickstart --host 0.0.0.0 --api-key-file key.txt

Any client of that interface asks it; pictures, sounds and videos come inside the request. docs/serving.md has examples.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from pathlib import Path

from moka.errors import MokaError

from .generate import add_quantization, quantization

KEY = "MOKA_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moka.serving import Limits

    limits = Limits()
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN", help="run folder of `moka train`, or an adapter folder"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"file with the API key (or set {KEY})")
    add = parser.add_argument_group("limits of a request").add_argument
    add("--max-megabytes", type=float, default=limits.megabytes, help=f"its size (default {limits.megabytes:g})")
    add("--max-new-tokens", type=int, default=limits.new_tokens, help=f"its answer (default {limits.new_tokens})")
    add("--max-seconds", type=float, default=limits.seconds, help=f"its time (default {limits.seconds:g})")
    add("--max-waiting", type=int, default=limits.waiting, help=f"requests at once (default {limits.waiting})")
    parser.add_argument("--backbone", metavar="FOLDER", help="where the language model is, if not where it was trained")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add_quantization(parser)


def run(arguments: argparse.Namespace) -> None:
    import transformers
    import uvicorn

    import moka
    from moka.inference import LoadedModel, share_equal_weights
    from moka.serving import Limits, build_app

    named = dict(_named(word) for word in arguments.runs)
    if len(named) < len(arguments.runs):
        raise MokaError("moka serve: two runs have the same name; give names, as NAME=RUN.")
    for name in ("max_megabytes", "max_new_tokens", "max_seconds", "max_waiting"):
        if getattr(arguments, name) <= 0:
            raise MokaError(
                f"--{name.replace('_', '-')}: {getattr(arguments, name)} is too small; above 0 is expected."
            )
    key = _key(arguments.api_key_file)
    given = (arguments.max_megabytes, arguments.max_new_tokens, arguments.max_seconds, arguments.max_waiting)
    transformers.utils.logging.disable_progress_bar()
    options = {"device": arguments.device, "backbone": arguments.backbone, "quantization": quantization(arguments)}
    with _listening(arguments.host, arguments.port) as listening:  # before models are loaded, which takes a while
        models: dict[str, LoadedModel] = {}
        for name, folder in named.items():
            models[name] = moka.load(folder, **options)
            saved = share_equal_weights(list(models.values()))
            if saved:
                print(f"{name}: {saved / 1e6:,.0f} MB are those of a model before it, and are kept once")
        app = build_app(models, Limits(*given), key)
        address, port = listening.getsockname()[:2]
        if key is None and not ipaddress.ip_address(address).is_loopback:
            print(f"note: anybody who reaches {address}:{port} may ask; set {KEY} or --api-key-file.")
        address = f"[{address}]" if ":" in address else address
        print(f"serving {', '.join(models)} at http://{address}:{port}/v1  (stop with Ctrl-C)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; of port 0, one that is free."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise MokaError(
            f"moka serve: cannot listen on {host}:{port} ({error}). Choose another --port or --host."
        ) from error


def _named(word: str) -> tuple[str, str]:
    name, equals, folder = word.partition("=")
    return (name, folder) if equals and not Path(word).exists() else (Path(word).resolve().name, word)


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(KEY) or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MokaError(f"--api-key-file {file}: cannot be read ({error}).") from error
    if not key:
        raise MokaError(f"--api-key-file {file}: is empty; write the key into it.")
    return key
