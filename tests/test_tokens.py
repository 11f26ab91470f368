"""Where the images of a row go in its conversation."""

from convllava_hf.tokens import place_images


def test_nothing_that_a_row_names_beside_its_images_reaches_a_processor():
    """Which would fetch it: transformers takes any of the keys `image`, `url`, `path` and `base64`."""
    part = {"type": "image", "text": None, "url": "http://127.0.0.1/secret", "path": "/etc/hosts"}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}]
    (message,) = place_images(messages, ["the image"])
    assert message["content"] == [{"type": "image", "image": "the image"}, {"type": "text", "text": "Which?"}]
