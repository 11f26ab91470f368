"""The tokens of a conversation with images, counted from the images' sizes alone.

A conversation is a list of messages in the form of TRL and transformers: `role`, and `content` as a list of
`{"type": "image"}` and `{"type": "text", "text": ...}`, or as text.

Notation: `H, W` pixels.
"""


def list_parts(messages: list[dict], num_images: int) -> list[dict]:
    """Makes lists of contents that are texts, as TRL does: the images go before the first question."""
    listed, left = [], num_images
    for message in messages:
        if isinstance(message["content"], str):
            before = left if message["role"] == "user" else 0
            left -= before
            text = {"type": "text", "text": message["content"]}
            message = {**message, "content": [{"type": "image", "text": None}] * before + [text]}
        listed.append(message)
    return listed


def place_images(messages: list[dict], images: list) -> list[dict]:
    """Puts images into the places of messages that stand for them, in reading order.

    Nothing else stays there: a processor would fetch what a row names beside.
    """
    left = iter(images)

    def fill(part: dict) -> dict:
        return {"type": "image", "image": next(left)} if part["type"] == "image" else part

    return [{**message, "content": [fill(part) for part in message["content"]]} for message in messages]


def count_image_tokens(sizes: list[tuple[int, int]], processor) -> list[int]:
    """Tokens of each image.

    Args:
        sizes: `(H, W)` of the images as they come in.
        processor: of a checkpoint of ours, or of a model of transformers that vLLM serves.
    """
    return processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] if sizes else []


def tokenize_row(messages: list[dict], sizes: list[tuple[int, int]], processor) -> list[int]:
    """Token ids of a conversation, image tokens included; arguments as above."""
    text = processor.apply_chat_template(messages, tokenize=False)
    counts = count_image_tokens(sizes, processor)
    text, _ = processor.get_text_with_replacements([text], [processor.image_token * count for count in counts])
    start = processor.tokenizer.bos_token
    has_start = bool(start) and text[0].startswith(start)  # else the tokenizer adds it, where it does so
    return processor.tokenizer(text[0], add_special_tokens=not has_start)["input_ids"]
