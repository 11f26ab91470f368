"""What a client may ask for: the fields of OpenAI's chat completions that are honoured, and no others.

A field that is not listed here is refused by name, so that nothing is silently ignored, and no setting of templates,
tokenizers or files can be reached over HTTP.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


MAX_IMAGES = 16
MAX_SCHEMA_CHARACTERS = 8192
# What structured output understands. Others (`pattern`, `$ref` ...) can make a grammar of any size out of a short text.
SCHEMA_KEYWORDS = frozenset(
    "$schema title description type properties required additionalProperties items enum const anyOf minItems maxItems "
    "minLength maxLength minimum maximum".split()
)
MAX_SCHEMA_COUNT = 256  # of items or characters that a schema asks for


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: what is wrong and what was expected.
        status: of the HTTP answer.
        kind: OpenAI's `type` of the error.
    """

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error"):
        super().__init__(message, status, kind)  # all that it is made of, so that it travels between processes
        self.status, self.kind = status, kind

    def __str__(self) -> str:
        return self.args[0]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


class ImageURL(_Strict):
    url: str
    detail: Literal["auto", "high"] = "auto"


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = Field(default=None, max_length=200)


class JsonSchema(_Strict):
    name: str = Field(default="answer", max_length=200)
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and only there")
        if self.json_schema is not None:
            check_schema(self.json_schema.schema_)
        return self


class StreamOptions(_Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class ChatRequest(_Strict):
    """A chat completion. Beyond OpenAI's fields: `top_k`, and `max_image_tokens`, the budget of each image."""

    model: str = Field(default="", max_length=500)
    messages: list[Message] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default=[], max_length=8)
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, max_length=500)
    max_image_tokens: int | None = Field(default=None, ge=1)
    generation_config: str | None = Field(default=None, max_length=20000, description="sent by `transformers chat`")

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value):
        return [] if value is None else [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        if len(self.image_urls) > MAX_IMAGES:
            raise ValueError(f"{len(self.image_urls)} images; expected at most {MAX_IMAGES}")
        if self.generation_config is not None:
            _read_generation_config(self)
        return self

    @property
    def image_urls(self) -> list[str]:
        """The URLs of all images, in reading order."""
        parts = [part for message in self.messages if isinstance(message.content, list) for part in message.content]
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that the answer follows, `"{}"` for any object, or `None`."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        if self.response_format.json_schema is None:
            return '{"type": "object"}'
        return json.dumps(self.response_format.json_schema.schema_)


def parse_request(body: bytes) -> ChatRequest:
    """Reads the body of a request.

    Args:
        body: JSON text.

    Raises:
        RequestError: it is no JSON, holds unknown fields or values out of range, or text that is no valid Unicode. The
            message names fields and never quotes their content.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False, include_context=False, include_input=False)[:3]:
            place = ".".join(str(step) for step in problem["loc"])[:100]
            problems.append(f"{place or 'body'}: {problem['msg']}")
        raise RequestError("; ".join(problems)[:1000]) from None


def check_schema(schema: dict) -> None:
    """Refuses schemas that structured output would not follow, or that make huge grammars.

    Raises:
        ValueError: it is too large, nests too deeply, or has other keywords than `SCHEMA_KEYWORDS`.
    """
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARACTERS:
        raise ValueError(f"the schema is longer than {MAX_SCHEMA_CHARACTERS} characters")

    def visit(node: Any, depth: int):
        if isinstance(node, bool):
            return
        if not isinstance(node, dict) or depth > 10:
            raise ValueError("the schema nests deeper than 10 levels, or has something else where a schema belongs")
        for key, value in node.items():
            if key not in SCHEMA_KEYWORDS:
                raise ValueError(f"the schema keyword {key[:50]!r} is not supported")
            if key in ("minItems", "maxItems", "minLength", "maxLength"):
                if not isinstance(value, int) or not 0 <= value <= MAX_SCHEMA_COUNT:
                    raise ValueError(f"{key} is not a number from 0 to {MAX_SCHEMA_COUNT}")
            elif key == "properties":
                if not isinstance(value, dict):
                    raise ValueError("properties is not an object")
                for part in value.values():
                    visit(part, depth + 1)
            elif key in ("items", "additionalProperties"):
                visit(value, depth + 1)
            elif key == "anyOf":
                if not isinstance(value, list):
                    raise ValueError("anyOf is not a list")
                for part in value:
                    visit(part, depth + 1)

    visit(schema, 0)


def _read_generation_config(request: ChatRequest) -> None:
    """Takes what `transformers chat` sends on top of the request: length and sampling, from a GenerationConfig as JSON.

    Its other entries are the defaults of that class; they are checked against it and have no effect.
    """
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    try:
        values = json.loads(request.generation_config)
    except (ValueError, RecursionError):
        raise ValueError("generation_config is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("generation_config is not a JSON object")
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample")
    taken = {name: values.pop(name) for name in names if name in values}
    for key, value in values.items():
        if key not in known or (value is not None and value != known[key]):
            raise ValueError(f"generation_config.{key[:50]} is not supported")
    sampling = bool(taken.pop("do_sample", None))
    checked = {"max_tokens": taken.pop("max_new_tokens", None), **(taken if sampling else {})}
    checked = {key: value for key, value in checked.items() if value is not None}
    _Sampling.model_validate(checked)
    for key, value in checked.items():
        if getattr(request, key) is None:
            setattr(request, key, value)


class _Sampling(_Strict):
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
