"""Requests per second and time to the first token: `convllava serve` against stock `transformers serve`, in one run.

Both serve the same checkpoint on loopback, each in a process of its own; they take turns, round by round, so a change
in the machine's speed meets both. Clients ask in a closed loop, each with its own images, and read streams. Before the
first round each server answers each client once. "follow-up" asks again about the first image of the client.

    python benchmarks/serving.py quickstart/checkpoint
    python benchmarks/serving.py quickstart/checkpoint --clients 1 8 --requests 8 --rounds 3
    python benchmarks/serving.py quickstart/checkpoint --quantize       # memory and agreement, no servers
"""

import argparse
import base64
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from machine import describe_machine, print_machine, print_table, show_progress, write_json


STOCK = """
import sys
from convllava_hf.registration import register
from transformers.cli.transformers import main
register()
main()
"""
QUESTIONS = ["What is in the picture?", "Which number is on the page?", "What color is it?", "How many are there?"]


def build_commands(checkpoint: str, ports: dict[str, int], device: str) -> dict[str, list[str]]:
    """How the servers are started: the name of each, and its command."""
    convllava = str(Path(sys.executable).with_name("convllava"))
    common = ["--device", device, "--dtype", "float32"]
    stock = ["serve", checkpoint, "--host", "127.0.0.1", "--port", str(ports["transformers serve"]), *common]
    return {
        "transformers serve": [sys.executable, "-c", STOCK, *stock],
        "convllava serve": [convllava, "serve", checkpoint, "--port", str(ports["convllava serve"]), *common],
    }


@contextmanager
def run_servers(checkpoint: str, device: str, seconds: float):
    """Starts both servers, waits until they answer, and stops them; yields the URL of each."""
    from transformers.image_utils import httpx

    ports = {}
    for name in ("transformers serve", "convllava serve"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[name] = free.getsockname()[1]
    processes = []
    with tempfile.TemporaryFile("w+") as log:
        try:
            for command in build_commands(checkpoint, ports, device).values():
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ)))
            deadline = time.monotonic() + seconds
            for port in ports.values():
                while True:
                    try:
                        httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                        break
                    except httpx.HTTPError:
                        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
                            log.seek(0)
                            raise RuntimeError(f"a server did not start:\n{log.read()[-3000:]}") from None
                        time.sleep(0.5)
            yield {name: f"http://127.0.0.1:{port}/v1" for name, port in ports.items()}
        finally:
            for process in processes:
                process.kill()


def build_images(count: int, side: int) -> list[str]:
    """Different pictures as data: URLs."""
    import numpy as np
    from PIL import Image

    random, urls = np.random.default_rng(0), []
    for _ in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def ask(client, checkpoint: str, url: str, question: str, tokens: int) -> tuple[float, float, str]:
    """Seconds to the first text, seconds, and the answer."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    started, first, text = time.perf_counter(), None, ""
    messages = [{"role": "user", "content": content}]
    for chunk in client.chat.completions.create(
        model=checkpoint, messages=messages, max_tokens=tokens, temperature=0, stream=True
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            text += chunk.choices[0].delta.content
    seconds = time.perf_counter() - started
    return first or seconds, seconds, text


def run_round(url: str, checkpoint: str, clients: int, requests: int, images: list[str], follow_up: bool, tokens: int):
    """One round: seconds for all, and what `ask` gave for each request."""
    from openai import OpenAI

    results, barrier = [None] * (clients * requests), threading.Barrier(clients + 1)

    def work(number: int):
        client = OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
        barrier.wait()
        for turn in range(requests):
            place = number * requests + turn
            image = images[number * requests if follow_up else place]
            results[place] = ask(client, checkpoint, image, QUESTIONS[turn % len(QUESTIONS)], tokens)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    if None in results:
        raise RuntimeError("a request failed; its error is above")
    return time.perf_counter() - started, results


def compare_servers(options) -> dict:
    """Runs the rounds and prints the tables."""
    most, rows, measured = max(options.clients), [], {}
    with run_servers(options.checkpoint, options.device, options.start_seconds) as urls:
        for clients in options.clients:
            for kind in ("new images", "follow-up"):
                found = {name: [] for name in urls}
                for turn in range(options.rounds + 1):
                    # Every round has pictures that no server has seen, but in the follow-up.
                    wanted = clients * options.requests
                    offset = (turn if kind == "new images" else 0) * most * options.requests
                    images = build_images(offset + wanted, options.side)[offset:]
                    for name, url in urls.items():
                        show_progress(f"{clients} clients, {kind}, round {turn}: {name}")
                        done = run_round(
                            url, options.checkpoint, clients, options.requests if turn else 1, images,
                            kind == "follow-up", options.tokens,
                        )  # fmt: skip
                        if turn:
                            found[name].append(done)
                for name, rounds in found.items():
                    firsts = sorted(first for _, results in rounds for first, _, _ in results)
                    rate = statistics.median(len(results) / seconds for seconds, results in rounds)
                    p50, p95 = firsts[len(firsts) // 2], firsts[int(len(firsts) * 0.95)]
                    measured[f"{clients} {kind} {name}"] = {"rate": rate, "p50": p50, "p95": p95}
                    stock = measured[f"{clients} {kind} transformers serve"]["rate"]
                    rows.append(
                        {
                            "clients": clients,
                            "images": kind,
                            "server": name,
                            "requests/s": f"{rate:.2f}",
                            "ratio": f"{rate / stock:.2f}",
                            "first token p50 s": f"{p50:.3f}",
                            "p95 s": f"{p95:.3f}",
                        }
                    )
                answers = [[text.strip() for _, results in rounds for *_, text in results] for rounds in found.values()]
                same = sum(a == b for a, b in zip(*answers, strict=True))
                measured[f"{clients} {kind} equal"] = [same, len(answers[0])]
    print_table("Servers", rows)
    print_table(
        "Equal answers",
        [{"case": key, "equal": f"{value[0]} of {value[1]}"} for key, value in measured.items() if "equal" in key],
    )
    return measured


def compare_quantized(options) -> dict:
    """Memory of the weights and agreement with float32, without and with the modules that are left as they are."""
    import torch
    from transformers.image_utils import load_image

    from convllava_hf.inference.load import load
    from convllava_hf.registration import register

    register()
    rows, expected = [], None
    for quantize in (None, "8bit", "4bit"):
        show_progress(f"quantize {quantize}")
        model, processor = load(options.checkpoint, device=options.device, dtype="float32", quantize=quantize)
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        logits = []
        for number, url in enumerate(build_images(8, options.side)):
            text = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % 4]}]}],
                add_generation_prompt=True,
            )
            inputs = processor(images=[load_image(url)], text=text, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                logits.append(model(**inputs, logits_to_keep=1).logits[0, -1].float())
        logits = torch.stack(logits)
        expected = logits if expected is None else expected
        kept = expected > -999  # ids that only round the vocabulary up
        cosine = torch.stack(
            [torch.cosine_similarity(a[k], b[k], dim=0) for a, b, k in zip(logits, expected, kept, strict=True)]
        )
        rows.append(
            {
                "weights": quantize or "float32",
                "MiB": f"{size / 2**20:.2f}",
                "cosine to float32, worst of 8": f"{cosine.min():.5f}",
                "first tokens equal": f"{(logits.argmax(-1) == expected.argmax(-1)).sum()} of {len(logits)}",
            }
        )
    print_table("Quantised", rows)
    return {"quantized": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=6, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--start-seconds", type=float, default=900.0)
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    machine = describe_machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    measured = compare_quantized(options) if options.quantize else compare_servers(options)
    print_machine(machine)
    write_json(options.json, json.loads(json.dumps({"machine": machine, "measured": measured})))


if __name__ == "__main__":
    main()
