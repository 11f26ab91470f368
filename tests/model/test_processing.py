"""The processor: placeholders, spacing between chunks, offsets, masks and token counts."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from convllava_hf import ConvLlavaProcessor


@pytest.fixture(scope="module")
def processor(converted):
    return AutoProcessor.from_pretrained(converted)


def picture(width=90, height=60):
    return Image.new("RGB", (width, height), "orange")


def test_placeholders_match_the_images_of_each_row(processor):
    images = [picture(300, 200), picture(64, 64), picture(100, 400)]
    settings = {"image_aspect_ratio": "native", "max_image_tokens": 16, "size": {"height": 256, "width": 256}}
    inputs = processor(
        text=["<image>\n<image>\nTwo?", "None?", "<image> one"],
        images=[images[:2], [], images[2:]],
        padding=True,
        return_tensors="pt",
        **settings,
    )
    tokens = [processor.image_processor.num_image_tokens(i.height, i.width, **settings) for i in images]
    per_row = (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist()
    assert per_row == [tokens[0] + tokens[1], 0, tokens[2]]
    assert len(set(tokens)) > 1 and inputs["image_sizes"].shape == (3, 2)


@pytest.mark.parametrize(
    "text, images, message",
    [
        ("<image> and <image>", 1, "2 <image> tokens and 1 images"),
        ("no placeholder", 1, "0 <image> tokens and 1 images"),
        ("<image>", 0, "1 <image> tokens and 0 images"),
    ],
)
def test_wrong_numbers_of_images_are_refused(processor, text, images, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[picture()] * images or None)


def test_images_of_another_row_do_not_count(processor):
    with pytest.raises(ValueError, match=r"\[2, 0\] <image> tokens and \[1, 1\] images"):
        processor(text=["<image><image>a", "b"], images=[[picture()], [picture()]], padding=True)


def test_a_tokenizer_without_the_placeholder_is_refused(reference, processor):
    tokenizer = AutoTokenizer.from_pretrained(reference / "convllava" / "llm")
    with pytest.raises(ValueError, match="no token '<image>'.*add_special_tokens"):
        ConvLlavaProcessor(processor.image_processor, tokenizer)


def test_batches_of_text_only_chats(processor):
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("Hi", "What is two?")]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, padding=True
    )
    assert "pixel_values" not in inputs and inputs["input_ids"].shape[0] == 2


@pytest.mark.parametrize(
    "text", ["<image>\nWhat?", "a<image>b<image>c", " <image>\nq", "<image><image>x", "  two", "▁u"]
)
def test_offsets_describe_the_text_that_was_tokenised(processor, text):
    num_images = text.count("<image>")
    replacements = [processor.image_token * 4] * num_images
    (expanded,), (entries,) = processor.get_text_with_replacements([text], replacements)
    rebuilt, position = "", 0
    for entry in entries:
        start, end = entry["span"]
        rebuilt += text[position:start]
        assert entry["new_span"] == (len(rebuilt), len(rebuilt) + len(entry["replacement"]))
        assert text[start:end] == entry["text"]
        rebuilt, position = rebuilt + entry["replacement"], end
    assert rebuilt + text[position:] == expanded


def test_masks_cover_the_answers_of_a_batch(processor):
    chats = []
    for question, answer, image in (("What?", "4 apples.", picture()), ("Hi", "Hello", None)):
        content = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
        chats.append([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    answers = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert answers == ["4 apples.</s>", "Hello</s>"]


def test_token_counts_for_servers(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[(140, 230), (60, 60)])
    assert data["num_image_tokens"] == [4, 4] and data["num_image_patches"] == [1, 1]
    native = processor._get_num_multimodal_tokens(image_sizes=[(64, 128)], image_aspect_ratio="native")
    assert native["num_image_tokens"] == [2]
    types = processor(text="<image>\nq", images=picture(), return_mm_token_type_ids=True)["mm_token_type_ids"][0]
    assert sum(types) == 4


def test_call_settings_reach_the_image_processor(processor):
    inputs = processor(
        text="<image>", images=picture(), return_tensors="pt", images_kwargs={"size": {"height": 192, "width": 192}}
    )
    assert inputs["pixel_values"].shape == (1, 3, 192, 192)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 9
    assert torch.equal(inputs["image_sizes"], torch.tensor([[192, 192]]))
