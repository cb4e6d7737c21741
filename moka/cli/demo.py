"""Ask a trained run in the browser: a chat with pictures, sound and video, with and without each modality.

  moka demo runs/quickstart                    http://127.0.0.1:7860, on this machine only
  moka demo RUN --host 0.0.0.0 --port 8080     whoever reaches this machine may ask
  moka demo RUN --share                        a public address through Gradio's servers, for a week

docs/demo.md shows the page.
"""

from __future__ import annotations

import argparse
import ipaddress
import socket
import tempfile
from pathlib import Path
from typing import Any

from moka.errors import MokaError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder of `moka train`, or an adapter folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default 7860; 0: any that is free")
    parser.add_argument("--share", action="store_true", help="also a public address, through Gradio's servers")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens (default 64)")
    parser.add_argument("--max-seconds", type=float, default=120, help="longest time of an answer (default 120)")
    parser.add_argument("--max-megabytes", type=int, default=64, help="largest file (default 64)")
    parser.add_argument("--backbone", metavar="FOLDER", help="where the language model is, if not where it was trained")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")


def run(arguments: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "max_seconds", "max_megabytes"):
        if getattr(arguments, name) <= 0:
            raise MokaError(
                f"--{name.replace('_', '-')}: {getattr(arguments, name)} is too small; above 0 is expected."
            )
    # Loading a model takes seconds; these are reported before.
    port = _free_port(arguments.host, arguments.port)
    import moka
    from moka.demo_page import FONTS, build_page, gr, write_examples

    loaded = moka.load(arguments.run, device=arguments.device, backbone=arguments.backbone)
    with tempfile.TemporaryDirectory(prefix="moka-demo-") as folder:
        examples = write_examples(loaded, samples, folder) if (samples := _test_samples(arguments.run)) else []
        name = Path(arguments.run).resolve().name
        page = build_page(loaded, name, examples, arguments.max_new_tokens, arguments.max_seconds)
        if arguments.share or not _is_loopback(arguments.host):
            print("note: anybody who reaches the page may ask.")
        try:
            page.launch(
                server_name=arguments.host,
                server_port=port,
                share=arguments.share,
                theme=gr.themes.Base(**FONTS),
                max_file_size=f"{arguments.max_megabytes}mb",
                allowed_paths=[folder],
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                footer_links=[],
            )
        except OSError as error:
            raise MokaError(f"moka demo: {' '.join(str(error).split())} Choose another --port or --host.") from error
        print(f"asking {name} at {page.share_url or page.local_url}  (stop with Ctrl-C)", flush=True)
        page.block_thread()


def _test_samples(run: str) -> Any:
    """Return the run's test questions; None, with a note, if there are none here."""
    from moka.evaluation.evaluate import open_questions
    from moka.training import load_config
    from moka.training.run_dir import CONFIG

    own = Path(run) / CONFIG
    if not own.is_file():
        return None
    data = load_config(own).data
    if data.test is None:
        return None
    try:
        return open_questions(data.test, "test", data.media_root)
    except MokaError as error:
        print(f"note: no examples: {error}")
        return None


def _free_port(host: str, port: int) -> int:
    """Return the port if it is free, or one that is for port 0."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
            return int(free.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise MokaError(
            f"moka demo: cannot listen on {host}:{port} ({error}). Choose another --port or --host."
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
