"""Asks a running server about an image, with OpenAI's client: the answer as it forms, then what it took.

    convllava serve MODEL
    python examples/serve_client.py photo.jpg "What is this?"
    python examples/serve_client.py photo.jpg "What is this?" --url http://localhost:8080/v1 --key KEY

Needs `pip install openai`.
"""

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--key", default="none")
    options = parser.parse_args(arguments)

    kind = mimetypes.guess_type(options.image)[0] or "image/png"
    url = f"data:{kind};base64," + base64.b64encode(options.image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": options.question}]

    client = OpenAI(base_url=options.url, api_key=options.key)
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
    )
    text = ""
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage:
            image_tokens = chunk.usage.prompt_tokens_details.image_tokens
            print(
                f"\n({chunk.usage.prompt_tokens} tokens in, {image_tokens} of them for the image; "
                f"{chunk.usage.completion_tokens} out)"
            )
    return text


if __name__ == "__main__":
    main()
