"""Requests per second and time to the first token: `convllava serve` against stock `transformers serve`, in one run.

Both serve the same checkpoint on loopback, each in a process of its own; they take turns, round by round, so a change
in the machine's speed meets both. Clients ask in a closed loop, each with its own images, and read streams. Before the
first round each server answers each client once. "follow-up" asks again about the first image of the client.

`--grown` serves a model of 8 layers of width 512 with random weights behind a tower for 512 pixels (64 tokens) instead,
with the checkpoint's processor: the quickstart's own model takes less time than the HTTP around it.

    python benchmarks/serving.py quickstart/checkpoint
    python benchmarks/serving.py quickstart/checkpoint --grown --tokens 64 --requests 2
    python benchmarks/serving.py quickstart/checkpoint --grown --quantize       # memory and agreement
"""

import argparse
import base64
import http.client
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
from urllib.parse import urlsplit

from machine import describe_machine, print_machine, print_table, show_progress, write_json


STOCK = """
import sys
from convllava_hf.registration import register
from transformers.cli.transformers import main
register()
main()
"""
QUANTIZED = ("8bit", "4bit", "int8")
QUESTIONS = ["What is in the picture?", "Which number is on the page?", "What color is it?", "How many are there?"]


def build_commands(checkpoint: str, device: str) -> dict[str, list[str]]:
    """How the servers are started: the name of each, and its command."""
    stock = [sys.executable, "-c", STOCK, "serve", checkpoint, "--host", "127.0.0.1"]
    common = ["--device", device, "--dtype", "float32"]
    return {
        "transformers serve": [*stock, *common],
        "convllava serve": [*build_command(checkpoint), *common],
    }


def build_command(checkpoint: str) -> list[str]:
    return [str(Path(sys.executable).with_name("convllava")), "serve", checkpoint]


@contextmanager
def run_servers(commands: dict[str, list[str]], seconds: float):
    """Starts servers, waits until they answer, and stops them; yields the URL of each and its process."""
    from transformers.image_utils import httpx

    urls, processes = {}, {}
    with tempfile.TemporaryFile("w+") as log:
        try:
            for name, command in commands.items():
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                urls[name] = f"http://127.0.0.1:{port}"
                processes[name] = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
            deadline = time.monotonic() + seconds
            for url in urls.values():
                while True:
                    try:
                        httpx.get(f"{url}/health").raise_for_status()
                        break
                    except httpx.HTTPError:
                        ended = any(process.poll() is not None for process in processes.values())
                        if ended or time.monotonic() > deadline:
                            log.seek(0)
                            raise RuntimeError(f"a server did not start:\n{log.read()[-3000:]}") from None
                        time.sleep(0.5)
            yield {name: (f"{url}/v1", processes[name]) for name, url in urls.items()}
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def grow(checkpoint: str, folder: str) -> str:
    """Saves a larger model with random weights and the processor of a checkpoint; returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    from convllava_hf.images import set_image_size

    config, processor = AutoConfig.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.max_position_embeddings = 512, 1408, 8, 2048
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 8, 64
    vision.hidden_sizes, vision.depths = [48, 96, 192, 384, 512], [2, 2, 4, 2, 2]
    text.initializer_range = 0.1  # with less, many tokens are nearly as likely as the first, and rounding decides
    set_image_size(processor.image_processor, 512)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


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


def ask(url: str, checkpoint: str, image: str, question: str, tokens: int) -> tuple[float, float, list[bytes]]:
    """Seconds to the first text, seconds, and the lines of the stream.

    A client of a few calls: OpenAI's takes about as long to read a stream as a small model to write it, on the same
    cores. The lines are parsed after the round.
    """
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    body = {"model": checkpoint, "messages": [{"role": "user", "content": content}], "stream": True}
    body |= {"max_tokens": tokens, "temperature": 0}
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=600)
    data, first, lines = json.dumps(body), None, []
    started = time.perf_counter()
    connection.request("POST", f"{target.path}/chat/completions", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{url} answered {response.status}: {response.read()[:500]}")
    while line := response.readline():
        lines.append(line)
        if first is None and read_text(line):
            first = time.perf_counter() - started
    seconds = time.perf_counter() - started
    connection.close()
    return first or seconds, seconds, lines


def read_text(line: bytes) -> str:
    """The text that a line of a stream adds to the answer."""
    if not line.startswith(b"data: {"):
        return ""
    choices = json.loads(line[6:])["choices"]
    return (choices[0]["delta"].get("content") or "") if choices else ""


def run_round(url: str, checkpoint: str, clients: int, requests: int, images: list[str], follow_up: bool, tokens: int):
    """One round: seconds for all, and for each request the seconds to its first text, its seconds and its answer."""
    results, barrier = [None] * (clients * requests), threading.Barrier(clients + 1)

    def work(number: int):
        barrier.wait()
        for turn in range(requests):
            place = number * requests + turn
            image = images[number * requests if follow_up else place]
            results[place] = ask(url, checkpoint, image, QUESTIONS[turn % len(QUESTIONS)], tokens)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if None in results:
        raise RuntimeError("a request failed; its error is above")
    return seconds, [(first, whole, "".join(map(read_text, lines))) for first, whole, lines in results]


def compare_servers(options) -> dict:
    """Runs the rounds and prints the tables."""
    most, rows, measured = max(options.clients), [], {}
    with run_servers(build_commands(options.checkpoint, options.device), options.start_seconds) as servers:
        for clients in options.clients:
            for kind in ("new images", "follow-up"):
                found = {name: [] for name in servers}
                for turn in range(options.rounds + 1):
                    # Every round has pictures that no server has seen, but in the follow-up.
                    wanted = clients * options.requests
                    offset = (turn if kind == "new images" else 0) * most * options.requests
                    images = build_images(offset + wanted, options.side)[offset:]
                    for name, (url, _) in servers.items():
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
    """Memory and agreement with float32 of each way to quantise: of the logits, and of a server with `--quantize`."""
    images, rows, expected = build_images(8, options.side), [], None
    for quantize in (None, *QUANTIZED):
        show_progress(f"quantize {quantize}")
        size, logits = compute_logits(options, quantize, images)
        command = [*build_command(options.checkpoint), "--device", options.device, "--dtype", "float32"]
        command += ["--quantize", quantize] if quantize else []
        with run_servers({"server": command}, options.start_seconds) as servers:
            url, process = servers["server"]
            _, answered = run_round(url, options.checkpoint, 8, 1, images, False, options.tokens)
            memory = read_memory(process.pid)
        answers = [text for *_, text in answered]
        expected = expected or (logits, answers)
        rows.append(
            {
                "weights": quantize or "float32",
                "weights, MiB": f"{size / 2**20:.1f}",
                "process, MiB": f"{memory / 2**20:.0f}",
                **compare_logits(logits, expected[0]),
                "answers equal": f"{sum(a == b for a, b in zip(answers, expected[1], strict=True))} of {len(answers)}",
            }
        )
    print_table("Quantised", rows)
    return {"quantized": rows}


def compute_logits(options, quantize: str | None, images: list[str]):
    """Bytes of the weights, and the logits `(I, V)` of the first token of an answer about each image."""
    import torch
    from transformers.image_utils import load_image

    from convllava_hf.inference.load import load

    model, processor = load(options.checkpoint, device=options.device, dtype="float32", quantize=quantize)
    logits = []
    for number, url in enumerate(images):
        content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[load_image(url)], text=text, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits.append(model(**inputs, logits_to_keep=1).logits[0, -1].float())
    return count_bytes(model), torch.stack(logits)


def count_bytes(model) -> int:
    """Bytes of parameters and buffers; what torchao packs is several tensors in one."""
    tensors, size = [*model.parameters(), *model.buffers()], 0
    while tensors:
        tensor = tensors.pop().data
        if hasattr(tensor, "__tensor_flatten__"):
            tensors += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            size += tensor.nbytes
    return size


def compare_logits(logits, expected) -> dict[str, str]:
    import torch

    kept = (expected > -999).all(0)  # not ids that only round the vocabulary up
    cosine = torch.cosine_similarity(logits[:, kept], expected[:, kept])
    return {
        "cosine to float32, worst": f"{cosine.min():.5f}",
        "first tokens equal": f"{(logits.argmax(-1) == expected.argmax(-1)).sum()} of {len(logits)}",
    }


def read_memory(process: int) -> int:
    """Bytes that a process keeps for itself (Linux)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=6, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    parser.add_argument("--grown", action="store_true", help="serve a larger model with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--start-seconds", type=float, default=900.0)
    parser.add_argument("--quantize", action="store_true", help="compare memory and agreement of quantised weights")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    machine = describe_machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    from convllava_hf.registration import register

    register()
    with tempfile.TemporaryDirectory() as folder:
        if options.grown:
            options.checkpoint = grow(options.checkpoint, folder)
        measured = compare_quantized(options) if options.quantize else compare_servers(options)
    print_machine(machine)
    write_json(options.json, json.loads(json.dumps({"machine": machine, "measured": measured})))


if __name__ == "__main__":
    main()
