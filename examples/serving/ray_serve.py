"""Several replicas of the server on one machine or many, with Ray Serve.

    pip install "convllava-hf[serving]" "ray[serve]"
    python examples/serving/ray_serve.py MODEL --replicas 2
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \
        -d '{"messages": [{"role": "user", "content": "Hello?"}]}'

Each replica is the server of `convllava serve`, with its limits, batches and cache. Ray starts replicas that died
again, asks each for its health, and replaces them one by one when `serve.run` is called with a changed application. A
request whose replica dies is sent to another one, by `--attempts`; a stream that has begun is not repeated.
For a cluster: `ray start --head` on one machine, `ray start --address=...` on the others, this script on the first.
"""

import argparse
import asyncio

import ray
from fastapi import FastAPI, Request
from fastapi.responses import Response
from ray import serve


@serve.deployment(health_check_period_s=2, health_check_timeout_s=20, max_ongoing_requests=64)
class Replica:
    """One model in one process."""

    def __init__(self, checkpoint: str, max_tokens: int):
        from convllava_hf.inference.load import load
        from convllava_hf.registration import register
        from convllava_hf.serving.backends import LocalBackend
        from convllava_hf.serving.engine import Engine
        from convllava_hf.serving.requests import parse_request

        register()
        self.parse = parse_request
        self.backend = LocalBackend(Engine(*load(checkpoint)), max_pixels=40_000_000, max_tokens=max_tokens)

    def check_health(self):
        if not self.backend.healthy:
            raise RuntimeError("the engine has stopped")

    async def answer(self, body: bytes) -> tuple[int, dict]:
        """Status and content of the answer to the body of a chat completion, without streaming."""
        import os
        import time

        from convllava_hf.serving.fetch import fetch_image
        from convllava_hf.serving.requests import RequestError

        try:
            request = self.parse(body)
            files = [await fetch_image(url, frozenset(), 32 * 2**20) for url in request.image_urls]
            answer = await self.backend.start(request, files)
            pieces, last = [], None
            async for last in answer.events:
                pieces.append(last.text)
            if last.error is not None:
                raise last.error
        except RequestError as error:
            return error.status, {"error": {"message": str(error), "type": error.kind, "code": error.status}}
        message = {"role": "assistant", "content": "".join(pieces)}
        choice = {"index": 0, "message": message, "finish_reason": last.finish_reason}
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": last.new_tokens}
        usage |= {"total_tokens": answer.prompt_tokens + last.new_tokens}
        head = {"id": f"chatcmpl-{os.getpid()}-{time.monotonic_ns()}", "object": "chat.completion"}
        return 200, {**head, "created": int(time.time()), "model": "served", "choices": [choice], "usage": usage}


front = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
@serve.ingress(front)
class Front:
    """Takes requests and passes them to the replicas; one whose replica died goes to another."""

    def __init__(self, replicas, attempts: int):
        self.replicas, self.attempts = replicas, attempts

    @front.post("/v1/chat/completions")
    async def complete(self, request: Request) -> Response:
        import json

        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > 44 * 2**20:
                return Response('{"error": {"message": "the body is too large"}}', 413, media_type="application/json")
        for attempt in range(self.attempts):
            try:
                status, content = await self.replicas.answer.remote(bytes(body))
                return Response(json.dumps(content), status, media_type="application/json")
            except (ray.exceptions.RayError, RuntimeError):
                if attempt == self.attempts - 1:
                    raise
                await asyncio.sleep(0.5 * (attempt + 1))

    @front.get("/health")
    async def health(self) -> dict:
        return {"status": "ok"}


def build(checkpoint: str, replicas: int, max_replicas: int, max_tokens: int, attempts: int):
    """The application: one front, and replicas between two numbers, as the load asks for."""
    if max_replicas > replicas:
        scaling = {"min_replicas": replicas, "max_replicas": max_replicas, "target_ongoing_requests": 16}
        model = Replica.options(autoscaling_config=scaling)
    else:
        model = Replica.options(num_replicas=replicas)
    return Front.bind(model.bind(checkpoint, max_tokens), attempts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument(
        "--max-replicas", type=int, default=0, help="more than --replicas: as many as the load asks for"
    )
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--attempts", type=int, default=5)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(
        build(options.checkpoint, options.replicas, options.max_replicas, options.max_tokens, options.attempts),
        blocking=True,
    )


if __name__ == "__main__":
    main()
