"""Images from anywhere, checkpoints in the right dtype, and answers that arrive whole, in pieces, or not at all."""

import gc
import logging
import os
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from io import BytesIO

import pytest
import torch
from PIL import Image
from tiny_checkpoint import build_tokenizer, save_tiny_checkpoint
from transformers import LogitsProcessor, set_seed

import convllava_hf
from convllava_hf.images import ImageError
from convllava_hf.inference import answer as answering
from convllava_hf.inference import load as loading
from convllava_hf.inference.answer import answer, make_message
from convllava_hf.inference.load import load


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint, device="cpu")


@pytest.fixture
def native(loaded):
    image_processor = loaded[1].image_processor
    image_processor.image_aspect_ratio = "native"
    yield
    image_processor.image_aspect_ratio = "pad"


# ---- loading


def test_the_three_lines_of_the_readme(checkpoint, photo):
    model, processor = convllava_hf.load(checkpoint)
    text = convllava_hf.answer(model, processor, "What is this?", photo)
    assert isinstance(text, str)
    assert not model.training


def test_attention_and_dtype_pass_through(checkpoint, photo):
    model, processor = load(str(checkpoint), dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config.text_config._attn_implementation == "eager"
    assert isinstance(answer(model, processor, "What is this?", photo, max_new_tokens=3), str)
    model, _ = load(checkpoint, dtype=torch.float64, attn_implementation="sdpa", device="cpu")
    assert model.dtype == torch.float64
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_gets_float32_unless_it_has_the_stored_dtype(dtype, native, tmp_path, monkeypatch, caplog):
    save_tiny_checkpoint(tmp_path, getattr(torch, dtype))
    check = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, check, lambda: native, raising=False)
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        model, _ = load(tmp_path, device="cpu")
        assert model.dtype == (getattr(torch, dtype) if native else torch.float32)
        messages = [record.getMessage() for record in caplog.records if record.name == loading.__name__]
        assert len(messages) == (not native)
        assert all(f"float32 instead of {dtype}" in message for message in messages)
        caplog.clear()
        assert load(tmp_path, device="cpu", dtype=dtype)[0].dtype == getattr(torch, dtype)
        assert not [record for record in caplog.records if record.name == loading.__name__]


@pytest.mark.parametrize(
    ("stored", "on_cpu", "chosen"),
    [
        ({"torch_dtype": "float64"}, True, "auto"),
        ({"dtype": "float32"}, True, "auto"),
        ({}, True, torch.float32),
        ({"dtype": "bfloat16"}, False, "auto"),
    ],
)
def test_other_dtypes_are_left_alone(stored, on_cpu, chosen):
    assert loading._choose_dtype("auto", stored, on_cpu) == chosen


def test_torch_says_whether_the_cpu_has_bfloat16():
    """The check is private in torch, so its name and its meaning are held here: oneDNN is told to see a plain AVX2."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("not an x86 CPU with AVX2")
    code = "import torch; print(torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "False", result.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device='gpu'.*'cpu'"),
        ({"device": "cuda:99"}, "device='cuda:99'.*cpu"),
        ({"dtype": "int8"}, "dtype='int8'.*'auto'"),
        ({"dtype": "bf16"}, "dtype='bf16'.*'auto'"),
        ({"quantize": "2bit"}, "quantize='2bit'.*'4bit'.*'8bit'.*'int8'"),
    ],
)
def test_wrong_options_are_named(options, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        load(checkpoint, **options)


def test_missing_and_original_checkpoints_are_named(reference, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="mm_vision_tower.*convllava convert"):
        load(reference / "convllava" / "llm")


def test_quantisation_names_its_extra(checkpoint, monkeypatch):
    monkeypatch.setitem(loading.QUANTIZERS, "4bit", "not_installed")
    with pytest.raises(ImportError, match=r"'4bit' needs not_installed: pip install 'convllava-hf\[quantization\]'"):
        load(checkpoint, quantize="4bit")


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantisation_leaves_vision_and_head_alone(quantize, checkpoint, loaded, photo):
    pytest.importorskip("bitsandbytes", reason="needs the extra 'quantization'")
    exact, processor = loaded
    model, _ = load(checkpoint, quantize=quantize)
    changed = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear
    }
    assert len(changed) == 2 * 7  # two layers of four projections of attention and three of the MLP
    assert all(name.startswith("model.language_model.") for name in changed)
    inputs = answering.prepare_inputs(processor, [make_message("user", "What is this?", [photo])])
    with torch.no_grad():
        a, b = (m(**inputs).logits[0, -1, : len(processor.tokenizer)].float() for m in (exact, model))
    assert torch.cosine_similarity(a, b, dim=0) > {"4bit": 0.6, "8bit": 0.99}[quantize]
    assert isinstance(answer(model, processor, "What is this?", photo, max_new_tokens=3), str)


def test_transformers_own_llava_works_too(tmp_path, photo):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=3,
        bos_token_id=None,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}"
        "{% endfor %}{% endfor %}:",
    ).save_pretrained(tmp_path)
    model, processor = load(tmp_path, device="cpu")
    stream = answer(model, processor, "What?", photo, max_new_tokens=3, stream=True)
    "".join(stream)
    assert (stream.stats.image_tokens, stream.stats.prompt_tokens) == (4, 4 + len("What?:"))
    with pytest.raises(ValueError, match="max_image_tokens=2 .*CLIPImageProcessor"):
        answer(model, processor, "What?", photo, max_image_tokens=2)


# ---- answers


class Script(LogitsProcessor):
    """Makes the model say a text. `before` is called with the number of tokens so far, in the generating thread."""

    def __init__(self, processor, text, before=None, end=True):
        self.tokens = processor.tokenizer.encode(text, add_special_tokens=False)
        self.tokens += [processor.tokenizer.eos_token_id] if end else []
        self.before, self.said = before, 0

    def __call__(self, input_ids, scores):
        if self.before:
            self.before(self.said)
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[self.said % len(self.tokens)]] = 0.0
        self.said += 1
        return forced


def test_the_answer_is_what_generate_gives(loaded, photo):
    model, processor = loaded
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What is this?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(tokens, skip_special_tokens=True).strip()
    assert answer(model, processor, "What is this?", [photo], max_new_tokens=20) == expected
    photo.save(file := BytesIO(), "PNG")
    stream = answer(model, processor, "What is this?", file.getvalue(), max_new_tokens=20, stream=True)
    assert "".join(stream) == stream.text == expected
    assert answer(model, processor, "What is this?", Image.new("RGB", (64, 64)), max_new_tokens=20) != expected


def test_pieces_are_whole_characters_without_outer_space(loaded):
    model, processor = loaded
    text = "  Grüße, 你好 🙂\n\n- so  viel\n "
    pieces = list(answer(model, processor, "Hi", stream=True, logits_processor=[Script(processor, text)]))
    assert "".join(pieces) == text.strip()
    assert answer(model, processor, "Hi", logits_processor=[Script(processor, text)]) == text.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces[:9] == ["G", "r", "ü", "ß", "e", ",", " 你", "好", " 🙂"]


def test_a_heading_ends_no_answer(loaded, monkeypatch):
    """Whatever the template contains; stop strings are the checkpoint's own."""
    model, processor = loaded
    monkeypatch.setattr(processor, "chat_template", processor.chat_template + "{# ### #}")
    text = "Items:\n### One\n#"
    pieces = list(answer(model, processor, "Hi", stream=True, logits_processor=[Script(processor, text)]))
    assert "".join(pieces) == text
    assert answer(model, processor, "Hi", logits_processor=[Script(processor, text)]) == text


@pytest.mark.parametrize("setting", ["answer_stop_strings", "stop_strings"])
def test_stop_strings_of_the_checkpoint_end_an_answer(setting, loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(model.generation_config, setting, ["###", "STOP"], raising=False)
    for said, expected in (("A # b.###Human: c", "A # b."), ("It is. STOP Now", "It is."), ("a ##", "a ##")):
        script = {"logits_processor": [Script(processor, said)]}
        stream = answer(model, processor, "Hi", stream=True, **script)
        assert "".join(stream) == expected and stream.stats.finish_reason == "stop"
        assert answer(model, processor, "Hi", logits_processor=[Script(processor, said)]) == expected


def test_beams_of_the_checkpoint_do_not_stop_a_stream(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(model.generation_config, "num_beams", 2)
    assert list(answer(model, processor, "Hi", stream=True, max_new_tokens=2)) is not None


def test_answers_and_pipelines_see_the_same_pixels(loaded, tmp_path):
    """A picture that transparency hides a part of: by `answer`, and by what pipelines call, by image and by path."""
    _, processor = loaded
    hidden = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
    hidden.paste((*RED, 255), (0, 0, 40, 60))
    hidden.save(path := tmp_path / "hidden.png")
    expected = answering.prepare_inputs(processor, [make_message("user", "Hi", [path])])["pixel_values"]
    for part in ({"image": Image.open(path)}, {"path": str(path)}, {"url": str(path)}):
        chat = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "Hi"}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected)
    assert not torch.equal(
        expected, processor.image_processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    )


def test_photos_are_drafted_when_it_is_asked_for(loaded, photo, tmp_path, monkeypatch):
    """By the argument, or by the image processor's setting; for the size that a budget leaves."""
    model, processor = loaded
    photo.resize((1024, 768)).save(path := tmp_path / "photo.jpg")

    def load(**settings):
        stream = answer(model, processor, "Hi", path, stream=True, max_new_tokens=1, **settings)
        return stream.messages[0]["content"][0]["image"].size

    assert load() == (1024, 768) and load(draft_photos=True) == (128, 96)
    assert load(draft_photos=True, max_image_tokens=1) == (128, 96)
    monkeypatch.setattr(processor.image_processor, "draft_photos", True)
    assert load() == (128, 96) and load(draft_photos=False) == (1024, 768)


def test_images_of_the_history_are_loaded_once(loaded, photo):
    model, processor = loaded
    stream = answer(model, processor, "Hi", photo, stream=True, max_new_tokens=2)
    list(stream)
    later = answer(model, processor, "And?", history=stream.history, stream=True, max_new_tokens=2)
    assert [message["content"][0]["image"] for message in (stream.messages[0], later.messages[0])] == [photo, photo]
    assert later.messages[0]["content"][0]["image"] is photo


def test_half_a_character_at_the_end_is_not_lost(loaded):
    model, processor = loaded
    stream = answer(
        model, processor, "Hi", stream=True, max_new_tokens=3, logits_processor=[Script(processor, "ab你", end=False)]
    )
    assert "".join(stream) == "ab\N{REPLACEMENT CHARACTER}"


def test_the_first_piece_arrives_while_the_model_still_works(loaded):
    model, processor = loaded
    consumed = threading.Event()

    def wait(said):
        assert said < 2 or consumed.wait(30), "the first piece did not arrive before the third token"

    stream = answer(model, processor, "Hi", stream=True, logits_processor=[Script(processor, "abcdef", wait)])
    assert next(stream) == "a"
    assert stream.stats.finish_reason is None and stream.stats.seconds is None
    assert stream.stats.seconds_to_first_token > 0
    consumed.set()
    assert list(stream) == list("bcdef")
    assert stream.stats.finish_reason == "stop"
    assert stream.stats.new_tokens == len("abcdef") + 1
    assert stream.stats.tokens_per_second > 0


def list_generating():
    return [thread for thread in threading.enumerate() if thread.name == "convllava-generate"]


def fail_at(number):
    def fail(said):
        if said == number:
            raise RuntimeError("boom")

    return fail


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_in_the_thread_reaches_the_caller(number, loaded):
    model, processor = loaded
    stream = answer(model, processor, "Hi", stream=True, logits_processor=[Script(processor, "abc", fail_at(number))])
    pieces = []
    with pytest.raises(RuntimeError, match="boom"):
        pieces.extend(iter(stream.__next__, None))
    assert stream.text == "abc"[:number]
    assert not list_generating()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_stream_that_is_left_stops(how, loaded):
    model, processor = loaded
    script = Script(processor, "ab", lambda said: time.sleep(0.01), end=False)
    stream = answer(model, processor, "Hi", stream=True, max_new_tokens=400, logits_processor=[script])
    stats = stream.stats
    assert next(stream) == "a"
    if how == "close":
        stream.close()
        assert list(stream) == []
    else:
        del stream
        gc.collect()
    assert not list_generating()
    assert stats.finish_reason == "interrupted"
    assert stats.new_tokens == script.said < 100


def test_ctrl_c_stops_the_generation(loaded):
    model, processor = loaded
    script = Script(processor, "ab", lambda said: interrupt_main() if said == 3 else time.sleep(0.01), end=False)
    stream = answer(model, processor, "Hi", stream=True, max_new_tokens=400, logits_processor=[script])
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert not list_generating()
    assert stream.stats.finish_reason == "interrupted"
    assert script.said < 100


def test_a_cut_answer_says_so(loaded):
    model, processor = loaded
    script = Script(processor, "abc", end=False)
    stream = answer(model, processor, "Hi", stream=True, max_new_tokens=5, logits_processor=[script])
    assert "".join(stream) == "abcab"
    assert (stream.stats.finish_reason, stream.stats.new_tokens) == ("length", 5)


def test_history_carries_text_and_images_in_order(loaded, photo, tmp_path):
    model, processor = loaded
    Image.new("RGB", (64, 64), RED).save(tmp_path / "second.png")
    first = answer(model, processor, "One?", photo, stream=True, logits_processor=[Script(processor, "Yes.")])
    assert "".join(first) == "Yes."
    history = [{"role": "system", "content": "Be brief."}, *first.history]
    second = answer(model, processor, "Two?", [tmp_path / "second.png"], history, stream=True, max_new_tokens=2)
    list(second)
    roles = [message["role"] for message in second.history]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    images = [part["image"] for message in second.history for part in message["content"] if part["type"] == "image"]
    assert [image.size for image in images] == [photo.size, (64, 64)]
    inputs = processor.apply_chat_template(
        second.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert second.stats.prompt_tokens == inputs["input_ids"].shape[1]
    assert second.stats.image_tokens == 8
    prompt = processor.decode(inputs["input_ids"][0])
    assert "<image>\nOne?<|im_end|>" in prompt and "Yes.<|im_end|>" in prompt and "Two?<|im_end|>" in prompt


def test_history_may_name_its_images(loaded, photo, tmp_path):
    model, processor = loaded
    path = tmp_path / "photo.png"
    photo.save(path, "PNG")
    answers = set()
    for part in ({"image": photo}, {"path": str(path)}, {"url": path}):
        content = [{"type": "image", **part}, {"type": "text", "text": "One?"}]
        answers.add(answer(model, processor, "Two?", history=[{"role": "user", "content": content}], max_new_tokens=9))
    assert len(answers) == 1
    with pytest.raises(ImageError, match="NoneType"):
        answer(model, processor, "Two?", history=[{"role": "user", "content": [{"type": "image"}]}])


def count_image_tokens(loaded, images, **options):
    stream = answer(*loaded, "What?", images, max_new_tokens=1, stream=True, **options)
    list(stream)
    return stream.stats.image_tokens


@pytest.mark.parametrize(("budget", "tokens"), [(1, 1), (3, 1), (4, 4), (5, 4), (1000, 4), (None, 4)])
def test_max_image_tokens_shrinks_the_trained_square(budget, tokens, loaded, photo):
    assert count_image_tokens(loaded, [photo, photo], max_image_tokens=budget) == 2 * tokens


@pytest.mark.parametrize(("budget", "tokens"), [(1, 1), (2, 2), (3, 2), (4, 2), (1000, 2), (None, 2)])
def test_max_image_tokens_is_the_budget_of_native_images(budget, tokens, loaded, native):
    assert count_image_tokens(loaded, Image.new("RGB", (128, 64)), max_image_tokens=budget) == tokens


def test_extreme_images_are_answered_or_refused_by_name(loaded):
    assert count_image_tokens(loaded, [Image.new("RGB", (1, 1)), Image.new("RGB", (2, 200))]) == 8


def test_extreme_native_images_are_answered_or_refused_by_name(loaded, native):
    assert count_image_tokens(loaded, [Image.new("RGB", (1, 1)), Image.new("RGB", (3200, 32))], max_image_tokens=4) == 5
    with pytest.raises(ValueError, match="64x16384 pixels .* 200:1"):
        answer(*loaded, "What?", Image.new("RGB", (40000, 157)))


def test_nothing_is_ever_cut_off(loaded, photo):
    model, processor = loaded
    context = model.config.text_config.max_position_embeddings
    stream = answer(model, processor, "x", photo, stream=True, logits_processor=[Script(processor, "ab", end=False)])
    list(stream)
    prompt = stream.stats.prompt_tokens
    # The default takes what is left, and the whole context can be used.
    assert stream.stats.new_tokens == context - prompt and stream.stats.finish_reason == "length"
    assert len(answer(model, processor, "x", photo, max_new_tokens=context - prompt)) > 0
    with pytest.raises(ValueError, match="max_image_tokens") as refusal:
        answer(model, processor, "x", photo, max_new_tokens=context)
    for part in (f"{prompt} tokens (4 ", f"max_new_tokens={context}:", f" {context} "):
        assert part in str(refusal.value)
    with pytest.raises(ValueError, match=rf"\b{context}\b"):
        answer(model, processor, "x" * context, photo)


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        (" \n", {}, "question"),
        ("\udcff", {}, "UTF-8"),
        ("<image>\nWhat?", {}, "'<image>'"),
        ("Hi", {"temperature": -1}, "temperature=-1"),
        ("Hi", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("Hi", {"max_image_tokens": 0}, "max_image_tokens=0"),
        ("Hi", {"images": ["nowhere.png"]}, "nowhere.png"),
        ("Hi", {"history": [{"role": "user", "content": "<image>"}]}, "'<image>'"),
    ],
)
def test_wrong_arguments_are_named(question, options, message, loaded):
    with pytest.raises(ValueError, match=message):
        answer(*loaded, question, **options)


def test_temperature_samples_and_zero_does_not(loaded, monkeypatch, caplog, capfd):
    model, processor = loaded
    sampled = []
    for seed in (1, 1, 2):
        set_seed(seed)
        sampled.append(answer(model, processor, "Hi", temperature=2.0, max_new_tokens=20))
    assert sampled[0] == sampled[1] != sampled[2]
    # The released checkpoints' generation settings ask for sampling; greedy answers must not warn about them.
    expected = answer(model, processor, "Hi", max_new_tokens=20)
    capfd.readouterr()
    for name, value in {"temperature": 0.9, "top_p": 0.6, "top_k": 7}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert answer(model, processor, "Hi", max_new_tokens=20) == expected
    assert not capfd.readouterr().err + caplog.text
