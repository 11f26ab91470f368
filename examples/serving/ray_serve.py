"""Several replicas of the model on one machine or many, with Ray Serve, behind the server of `convllava serve`.

    pip install "convllava-hf[serving,ray]"
    python examples/serving/ray_serve.py MODEL --replicas 2
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \
        -d '{"messages": [{"role": "user", "content": "Hello?"}]}'

The front has the limits, the key, the streams and the metrics of `convllava serve`; each replica has an engine with its
batches and its cache. Ray starts replicas that died again, asks each for its health, and starts more of them under load
(`--max-replicas`). A request whose replica dies goes to another one, by `--attempts`, also where its stream has begun:
what was sent is not sent again. (Sampling repeats, as every request has a seed. In half precision a repeated answer can
differ from its beginning by rounding.)

For a cluster: `ray start --head` on one machine, `ray start --address=...` on the others, this script on the first.
Started there once more with another model or other settings, with `--detach`, it replaces the replicas one by one and
ends; a cluster that this script has started by itself lets no other process in. (Where the cluster asks for a token, as
it does after `ray get-auth-token --generate`, set RAY_AUTH_MODE=token too.)
"""

import argparse
import asyncio
import os
import random

import ray
from ray import serve

from convllava_hf.serving.backends import Answer, LocalBackend
from convllava_hf.serving.engine import Engine, Event
from convllava_hf.serving.requests import ChatRequest, RequestError
from convllava_hf.serving.server import ServerOptions, build_app


NAME = "convllava"


@serve.deployment(health_check_period_s=2, health_check_timeout_s=20, max_ongoing_requests=64)
class Replica:
    """One model in one process."""

    def __init__(self, checkpoint: str, dtype: str, max_pixels: int, max_tokens: int):
        from convllava_hf.inference.load import load
        from convllava_hf.registration import register

        register()
        self.backend = LocalBackend(Engine(*load(checkpoint, dtype=dtype)), max_pixels, max_tokens)

    def check_health(self):
        if not self.backend.healthy:
            raise RuntimeError("the engine has stopped")

    async def answer(self, request: ChatRequest, files: list[bytes]):
        """Numbers of tokens, of the prompt and of its images; then the events of the answer."""
        try:
            answer = await self.backend.start(request, files)
        except RequestError as error:
            yield Event(error=error)
            return
        try:
            yield answer.prompt_tokens, answer.image_tokens
            async for event in answer.events:
                yield event
        finally:
            answer.cancel()


class Replicas:
    """The replicas as a backend of the server: takes requests to one, and to another when that one dies."""

    healthy = True

    def __init__(self, attempts: int):
        self.attempts, self.waiting = attempts, 0
        self.handle = serve.get_deployment_handle("Replica", NAME).options(stream=True)

    async def start(self, request: ChatRequest, files: list[bytes]) -> Answer:
        if request.temperature and request.seed is None:
            request.seed = random.getrandbits(32)  # so that another replica gives the same answer
        running = []  # what the replica sends; empty before, and `None` in it after the client has left
        items = self._read(request, files, running)
        first = await anext(items)
        if isinstance(first, Event):
            raise first.error

        def cancel():
            stream = running[-1]
            running.append(None)
            if stream is not None:
                stream.cancel()

        return Answer(*first, items, cancel)

    async def _read(self, request: ChatRequest, files: list[bytes], running: list):
        begun, sent = False, 0
        self.waiting += 1
        try:
            for attempt in range(self.attempts):
                await asyncio.sleep(attempt / 2)
                running.append(self.handle.answer.remote(request, files))
                seen = 0
                try:
                    async for item in running[-1]:
                        if not isinstance(item, Event):
                            if not begun:
                                yield item
                            begun = True
                            continue
                        text, seen = item.text[max(0, sent - seen) :], seen + len(item.text)
                        sent = max(sent, seen)
                        yield Event(text, item.finish_reason, item.new_tokens, item.error)
                    return
                except ray.exceptions.RayError:  # the replica is gone, or the client
                    if running[-1] is None:
                        yield Event(finish_reason="stop")
                        return
            yield Event(error=RequestError("no replica answers; try again", status=503, kind="server_error"))
        finally:
            self.waiting -= 1

    async def close(self) -> None:
        pass


def build(checkpoint: str, options: argparse.Namespace):
    """The application: one front, and replicas between two numbers, as the load asks for."""

    def build_front():
        name = os.path.basename(checkpoint.rstrip("/"))
        return build_app(Replicas(options.attempts), ServerOptions(name, os.environ.get("CONVLLAVA_API_KEY")))

    replicas = {"num_replicas": options.replicas}
    if options.max_replicas > options.replicas:
        scaling = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        replicas = {"autoscaling_config": {**scaling, "target_ongoing_requests": 16}}
    model = Replica.options(**replicas, ray_actor_options={"num_gpus": options.gpus})
    front = serve.deployment(serve.ingress(build_front)(), name="Front", max_ongoing_requests=1000)
    front = front.options(ray_actor_options={"num_cpus": 0})
    return front.bind(model.bind(checkpoint, options.dtype, options.max_image_pixels, options.max_tokens))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--max-replicas", type=int, default=0, help="more of them: as many as the load asks for")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-image-pixels", type=int, default=40_000_000)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--attempts", type=int, default=5)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--detach", action="store_true", help="leave the replicas to the cluster, and end")
    options = parser.parse_args(arguments)
    ray.init(address="auto" if options.detach else None)  # "auto" is the cluster that runs, and never a new one
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(build(options.checkpoint, options), name=NAME, blocking=not options.detach)


if __name__ == "__main__":
    main()
