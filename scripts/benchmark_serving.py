"""Ask a running `moka serve` from several clients at once: answers a second, errors, whether answers stay the same.

moka serve runs/quickstart &
python scripts/benchmark_serving.py http://127.0.0.1:8000/v1 --clients 8 --seconds 60
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import statistics
import threading
import time
from collections import Counter

import numpy as np
import openai
from PIL import Image


def picture(seed: int) -> str:
    """A data URL of a picture of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (28, 28), np.uint8)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=8)
    arguments = parser.parse_args()
    client = openai.OpenAI(
        base_url=arguments.address, api_key=os.environ.get("MOKA_API_KEY", "none"), max_retries=0, timeout=120
    )
    model = arguments.model or client.models.list().data[0].id
    times, errors = [], Counter[str]()
    answers: dict[int, set[str]] = {number: set() for number in range(arguments.clients)}
    end = time.monotonic() + arguments.seconds

    def ask(number: int) -> None:
        parts = [
            {"type": "image_url", "image_url": {"url": picture(number)}},
            {"type": "text", "text": "Which digit is written?"},
        ]
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                answer = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": parts}], max_tokens=arguments.max_tokens
                )
            except openai.OpenAIError as error:
                errors[f"{type(error).__name__}: {error}"] += 1
                continue
            times.append(time.monotonic() - began)
            answers[number].add(answer.choices[0].message.content or "")

    threads = [threading.Thread(target=ask, args=(number,)) for number in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changed = sum(len(one) > 1 for one in answers.values())
    print(
        f"{arguments.clients} clients, {arguments.seconds:g} s: {len(times)} answers ({len(times) / arguments.seconds:.1f} a second), "
        f"{sum(errors.values())} errors, {changed} clients whose answer changed"
    )
    if times:
        print(f"seconds an answer: median {statistics.median(times):.2f}, longest {max(times):.2f}")
    for message, count in errors.most_common():
        print(f"{count} x {message}")


if __name__ == "__main__":
    main()
