"""What an honest client gets: answers equal to those of `answer`, pieces, ends, usage, models, metrics."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from loopback import serve_http
from running_server import KEY, build_content, build_data_url, run_front
from transformers.image_utils import httpx

from convllava_hf.inference.answer import answer
from convllava_hf.serving.engine import FeatureCache


def test_an_answer_is_that_of_the_model(server, pictures):
    expected = answer(server.model, server.processor, "What is this?", pictures[:2], max_new_tokens=8)
    content = build_content("What is this?", *map(build_data_url, pictures[:2]))
    messages = [{"role": "user", "content": content}]
    reply = server.client.chat.completions.create(model="any name", messages=messages, max_tokens=8)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason in ("stop", "length")
    inputs = server.processor(text="<image>", images=pictures[:1])
    per_image = inputs["input_ids"][0].count(server.processor.image_token_id)
    assert reply.usage.prompt_tokens_details.image_tokens == 2 * per_image
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens

    stream = server.client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == expected and len(pieces) > 1
    assert chunks[-1].usage == reply.usage


def test_a_conversation_is_that_of_the_model(server, pictures):
    history = [
        {"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A page."},
    ]
    expected = answer(server.model, server.processor, "And now?", history=history, max_new_tokens=8)
    messages = [
        {"role": "user", "content": build_content("What?", build_data_url(pictures[0]))},
        {"role": "assistant", "content": "A page."},
        {"role": "user", "content": "And now?"},
    ]
    reply = server.post({"messages": messages, "max_tokens": 8})
    assert reply.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_and_are_left_out(server, stream):
    whole = answer(server.model, server.processor, "Hello?", max_new_tokens=16)
    stop = whole[3:6]
    expected = whole[: whole.index(stop)].rstrip()
    request = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 16, "model": "m", "stop": [stop]}
    reply = server.client.chat.completions.create(**request, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in reply if chunk.choices]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == (expected, "stop")


def test_a_seed_repeats_a_sample_alone_and_in_company(server):
    settings = {"temperature": 1.5, "max_tokens": 12}
    first = server.ask(seed=7, **settings).json()["choices"][0]["message"]["content"]
    found = [None] * 6

    def ask(place):
        found[place] = server.ask(seed=7 if place % 2 else place, **settings).json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found[1] == found[3] == found[5] == first
    assert len({first, found[0], found[2], found[4]}) > 1


def test_greedy_answers_in_a_batch_are_those_alone(server, pictures):
    """Images of several shapes, none, and prompts of several lengths, all at once."""
    chats = [
        (f"Question {number}, {'please ' * number}what is it?", pictures[number % 4 : number % 4 + number % 3])
        for number in range(8)
    ]
    found = [None] * len(chats)

    def ask(place):
        text, images = chats[place]
        reply = server.ask(build_content(text, *map(build_data_url, images)), max_tokens=12)
        found[place] = reply.json()["choices"][0]["message"]["content"]

    for place in range(len(chats)):
        ask(place)
    alone, found[:] = [*found], [None] * len(chats)
    server.backend.engine.cache = FeatureCache(2**29)  # so that the tower runs again

    sizes, observe = [], server.backend.engine.batch_sizes
    server.backend.engine.batch_sizes = sizes.append
    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(chats))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    server.backend.engine.batch_sizes = observe
    assert found == alone
    assert max(sizes) > 1, "nothing was batched"


def test_clients_that_ask_again_stay_one_batch(server):
    """Two groups would each wait for the answers of the other; one client alone waits for nobody."""
    sizes, engine = [], server.backend.engine
    observe, patience = engine.batch_sizes, engine.batch_seconds
    engine._ended -= 5.0  # who asked in another test does not come back
    engine.batch_sizes, engine.batch_seconds = sizes.append, 5.0

    def ask():
        for _ in range(8):
            assert server.ask(max_tokens=4).status_code == 200

    try:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert sum(sizes) == 32 and sizes.count(4) >= 4, sizes  # the first and the last come one by one
        while engine._running:
            time.sleep(0.01)
        engine._ended -= 5.0  # the others do not come back
        started = time.monotonic()
        for _ in range(3):
            server.ask(max_tokens=1)
        assert time.monotonic() - started < engine.batch_seconds
    finally:
        engine.batch_sizes, engine.batch_seconds = observe, patience


def test_a_follow_up_skips_the_tower(server, pictures):
    calls = []
    hook = server.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    url = build_data_url(pictures[0].rotate(90, expand=True))
    try:
        first = server.ask(build_content("What is it?", url)).json()
        assert len(calls) == 1
        assert server.ask(build_content("What is it?", url)).json()["choices"] == first["choices"]
        server.ask(build_content("And what else?", url))
        assert len(calls) == 1
    finally:
        hook.remove()


def test_the_cache_of_features_is_bounded():
    import torch

    cache = FeatureCache(max_bytes=3 * 40)
    for key in "abcd":
        cache.put(key, torch.zeros(10))
        cache.get("a")
    assert cache.num_bytes == 120
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.put("too large", torch.zeros(100))
    assert cache.get("too large") is None and cache.num_bytes == 120


def test_text_waits_for_what_may_change_it(server):
    from convllava_hf.inference.answer_text import AnswerText

    tokenizer = server.processor.tokenizer
    tokens = iter(tokenizer("Grüße und Küsse, ENDE.", add_special_tokens=False)["input_ids"])
    text, shown = AnswerText(tokenizer, ("ENDE",)), []
    while not text.stopped:
        shown.append(text.push(next(tokens)))
        assert "E" not in "".join(shown) and "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
    assert "".join(shown) == "Grüße und Küsse,"


def test_answers_follow_a_schema(server, pictures):
    pytest.importorskip("xgrammar")
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["page", "photo"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "picture", "schema": schema}}
    reply = server.ask(build_content("What?", build_data_url(pictures[0])), response_format=form, max_tokens=64)
    answered = json.loads(reply.json()["choices"][0]["message"]["content"])
    assert answered["kind"] in ("page", "photo") and 0 <= answered["count"] <= 9


def test_max_image_tokens_bounds_an_image(server, pictures):
    def count(**settings):
        reply = server.ask(build_content("What?", build_data_url(pictures[0])), **settings)
        return reply.json()["usage"]["prompt_tokens_details"]["image_tokens"]

    assert 1 == count(max_image_tokens=1) < count()


def test_models_health_and_metrics(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    server.ask()
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert 'convllava_requests_total{status="200"}' in text
    assert "convllava_first_token_seconds_bucket" in text and "convllava_batch_size_bucket" in text


def test_what_transformers_chat_sends_is_understood(server):
    from transformers import GenerationConfig

    # Before anything else it asks for the model to be loaded, without a key.
    with httpx.stream("POST", f"{server.url}/load_model", json={"model": "any"}) as reply:
        assert [json.loads(line[6:])["status"] for line in reply.iter_lines() if line] == ["ready"]

    config = GenerationConfig(max_new_tokens=3, do_sample=False).to_json_string()
    reply = server.ask(generation_config=config, max_tokens=None)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] <= 3
    assert server.ask(generation_config=json.dumps({"num_beams": 400})).status_code == 400


def test_a_client_that_leaves_ends_its_answer(server):
    """Seen on the engine: the row ends after a few tokens of the 64 that were asked for."""
    from convllava_hf.serving import engine

    seen, finished = [], threading.Event()
    finish = engine.Job.finish

    def note(job, reason):
        seen.append((job.cancelled, len(job.text.tokens)))
        finish(job, reason)
        finished.set()

    slow = server.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    engine.Job.finish = note
    try:
        with server.client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Tell me a long story."}],
            max_tokens=64,
            stream=True,
            temperature=2.0,
            seed=3,
        ) as stream:
            next(iter(stream))
        assert finished.wait(30)
    finally:
        engine.Job.finish = finish
        slow.remove()
    assert seen[0][0] and seen[0][1] < 64, seen
    assert server.ask().status_code == 200


def test_an_engine_behind_the_server_gets_checked_requests(server, pictures):
    """The way to vLLM: here another server of ours stands behind the front."""
    with run_front(server) as front:
        content = build_content("What?", build_data_url(pictures[0]))
        behind, direct = front.ask(content).json(), server.ask(content).json()
        assert (behind["choices"], behind["usage"]) == (direct["choices"], direct["usage"])
        assert behind["model"] == "front" and front.backend.waiting == 0
        assert front.ask(n=2).status_code == 400
        assert str(server.backend.engine.context) in front.ask("word " * 20000).json()["error"]["message"]


def test_an_engine_that_ends_in_the_middle_is_an_error_and_leaves_no_place_taken():
    """Nor does a client that is gone before its answer is read: there is one place here. (This engine has no key.)"""
    from convllava_hf.serving.backends import RemoteBackend
    from convllava_hf.serving.requests import ChatRequest

    class Dying(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "Half an"}}]}\n\n')

    async def ask(url: str):
        backend = RemoteBackend(url, "m", "", 1, 8, max_queue=1)
        chat = ChatRequest(messages=[{"role": "user", "content": "Hello?"}])
        for _ in range(2):
            (await backend.start(chat, [])).cancel()
            first, last = [event async for event in (await backend.start(chat, [])).events]
            assert first.text == "Half an" and last.error.status == 503 and last.finish_reason is None
        await backend.close()

    with serve_http(Dying) as service:
        asyncio.run(ask(f"http://127.0.0.1:{service.server_port}/v1"))


def test_what_is_there_at_the_same_time_is_one_write(server):
    """Tokens that came while the server was busy go out together; joined, the pieces are the whole answer."""
    from convllava_hf.serving.requests import ChatRequest

    engine = server.backend.engine

    async def read():
        chat = ChatRequest(messages=[{"role": "user", "content": "Hello?"}], max_tokens=8)
        answer = await server.backend.start(chat, [])
        while engine.waiting or engine._running:
            await asyncio.sleep(0.01)
        return [event async for event in answer.events]

    (event,) = asyncio.run(read())
    whole = server.ask(max_tokens=8).json()
    assert event.text == whole["choices"][0]["message"]["content"]
    assert event.new_tokens == whole["usage"]["completion_tokens"]


def test_the_benchmark_of_serving_asks_as_clients_do(server, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import serving

    with run_front(server) as front:
        images = serving.build_images(2, 64)
        seconds, results = serving.run_round(f"{front.url}/v1", "m", 2, 1, images, False, 4)
        for image, (first, whole, text) in zip(images, results, strict=True):
            direct = server.ask(build_content(serving.QUESTIONS[0], image), max_tokens=4).json()
            assert text == direct["choices"][0]["message"]["content"]
            assert 0 < first <= whole <= seconds


def test_the_benchmark_of_serving_compares_quantised_weights(converted, monkeypatch):
    pytest.importorskip("torchao", reason="needs the extra `quantization`")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import serving

    options = SimpleNamespace(checkpoint=str(converted), device="cpu")
    images = serving.build_images(2, 64)
    size, expected = serving.compute_logits(options, None, images)
    smaller, logits = serving.compute_logits(options, "int8", images)
    assert smaller < size
    assert float(serving.compare_logits(expected, expected)["cosine to float32, worst"]) == 1
    assert 0.99 < float(serving.compare_logits(logits, expected)["cosine to float32, worst"]) < 1
