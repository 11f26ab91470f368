"""What a client may ask for: the fields of OpenAI's chat completions that are honoured, and no others.

A field that is not listed here is refused by name, so that nothing is silently ignored, and no setting of templates,
tokenizers or files can be reached over HTTP.
"""

import json
import string
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)


TEXT_BYTES = 2**20  # what a body may hold beside its images
MAX_IMAGES = 16
MAX_SCHEMA_CHARACTERS = 8192
MAX_SCHEMA_DEPTH = 24  # a property of an object is two levels
BASE64 = (string.ascii_letters + string.digits + "+/=").encode()


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


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=1000, fail_fast=True)]
    name: str | None = Field(default=None, max_length=200)


Count = Annotated[int, Field(ge=0, le=256)]
SchemaOrBool = Annotated["bool | Schema", Field(union_mode="left_to_right")]


class Schema(_Strict):
    """What structured output understands. Other keywords (`pattern`, `$ref` ...) can make a grammar of any size out of
    a short text."""

    model_config = ConfigDict(strict=True)

    dialect: str | None = Field(default=None, alias="$schema")
    title: str | None = None
    description: str | None = None
    type: str | list[str] | None = None
    properties: dict[str, SchemaOrBool] = {}
    required: list[str] = []
    additionalProperties: SchemaOrBool = True
    items: SchemaOrBool = True
    enum: list = []
    const: Any = None
    anyOf: list[SchemaOrBool] = []
    minItems: Count = 0
    maxItems: Count = 0
    minLength: Count = 0
    maxLength: Count = 0
    minimum: float = 0
    maximum: float = 0


def measure_depth(value: Any) -> int:
    """Levels of lists and objects in each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(measure_depth, inner), default=0)


def check_schema(schema: dict) -> dict:
    """A JSON schema as it is; raises ValueError where it is too long, too deep, or something else than a [`Schema`]."""
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARACTERS:
        raise ValueError(f"the schema is longer than {MAX_SCHEMA_CHARACTERS} characters")
    if measure_depth(schema) > MAX_SCHEMA_DEPTH:
        raise ValueError(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
    Schema.model_validate(schema)
    return schema


class JsonSchema(_Strict):
    name: str = Field(default="answer", max_length=200)
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], AfterValidator(check_schema)] = Field(alias="schema")


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and only there")
        return self


class StreamOptions(_Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampling(_Strict):
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1, lt=2**31)


class ChatRequest(_Sampling):
    """A chat completion. Beyond OpenAI's fields: `top_k`, and `max_image_tokens`, the budget of each image."""

    model: str = Field(default="", max_length=500)
    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default=[], max_length=8)
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, max_length=500)
    max_image_tokens: int | None = Field(default=None, ge=1, lt=2**31)
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
            message names fields and never quotes their content. 413 where it is too long without its images.
    """
    # Images are base64. Every field and every item of a list takes other characters, too, and memory when it is read.
    if len(body) > TEXT_BYTES and len(body.translate(None, BASE64)) > TEXT_BYTES:
        raise RequestError(f"the body has more than {TEXT_BYTES} bytes beside its images", status=413)
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > 100:  # a description of each would take more memory than the body
            raise RequestError(f"body: {error.error_count()} fields that are not as expected") from None
        problems = []
        for problem in error.errors(include_url=False, include_context=False, include_input=False)[:3]:
            place = ".".join(str(step) for step in problem["loc"])[:100]
            problems.append(f"{place or 'body'}: {problem['msg']}")
        raise RequestError("; ".join(problems)[:1000]) from None


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
