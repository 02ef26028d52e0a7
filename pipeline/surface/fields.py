"""Types of the fields of bodies. A bound, and what holds where a field is not given, is named once, here: all bodies check it and
`/openapi.json` tells it. Beside them the fields that ask for what nobody serves."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pipeline.errors import InvalidRequest
from pipeline.logprobs import MOST

LARGEST = 2**31 - 1


def unless_given(value: Any) -> dict[str, Any]:
    """For a type's `extra_json_schema`: what a field stands for that is not given, or null."""
    return {"default": value}


def unless(*harmless: Any, why: str = "is not supported") -> Meta:
    """Of a field that is refused by name unless it is null or one of these values, which ask for nothing beyond what is done anyway.
    `why`: what the error says of it."""
    return Meta(
        description="Not supported: refused by name, unless the value asks for nothing.",
        extra_json_schema={"enum": [None, *harmless]},
        extra={"harmless": harmless, "why": why},
    )


On = Annotated[bool, Meta(extra_json_schema=unless_given(True))]  # unless it is given, or null
Off = Annotated[bool, Meta(extra_json_schema=unless_given(False))]

Count = Annotated[int, Meta(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Meta(ge=0, le=LARGEST, description="0: the prompt alone is told.")]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Meta(max_length=16)]
StopTokenIds = Annotated[list[int], Meta(max_length=64)]
Likeliest = Annotated[int, Meta(ge=0, le=MOST)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="Without one every answer is another.")]
Choices = Annotated[
    int, Meta(ge=1, le=128, description="At most what the engine runs at once.", extra_json_schema=unless_given(1))
]
Temperature = Annotated[float, Meta(ge=0, le=2, description="0 is greedy.", extra_json_schema=unless_given(1.0))]
TopP = Annotated[float, Meta(gt=0, le=1, extra_json_schema=unless_given(1.0))]
TopK = Annotated[int, Meta(ge=-1, le=LARGEST, description="-1 and 0: all.", extra_json_schema=unless_given(0))]
CountedTopK = Annotated[int, Meta(ge=0, le=LARGEST, description="0: all.", extra_json_schema=unless_given(0))]
MinP = Annotated[float, Meta(ge=0, le=1, extra_json_schema=unless_given(0.0))]
Penalty = Annotated[float, Meta(ge=-2, le=2, extra_json_schema=unless_given(0.0))]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=2, extra_json_schema=unless_given(1.0))]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[dict[str, Bias], Meta(max_length=1024, description="Token ids, as text, and what is added.")]
MinTokens = Annotated[int, Meta(ge=0, le=LARGEST, extra_json_schema=unless_given(0))]
TruncatePromptTokens = Annotated[
    int, Meta(ge=-1, le=LARGEST, description="The last so many of the prompt are read; -1: as many as fit.")
]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=256, description="Who says another one shares no blocks.")]
Priority = Annotated[
    int, Meta(ge=-(2**31), le=LARGEST, description="Below 0, 0, above 0: the lanes high, default, low.")
]
Anchor = Literal["created_at"]  # from when on a file lives
Life = Annotated[int, Meta(ge=3600, le=2_592_000)]  # and for how many seconds
ServiceTier = Literal["auto", "default", "scale", "priority", "fast", "flex", "batch"]
Effort = Annotated[str, Meta(pattern="^[a-z]{1,16}$", description="For the chat template.")]
TemplateVariables = Annotated[dict[str, Any], Meta(description="The chat template's own variables.")]
MOST_TOOLS = Meta(max_length=128)
CLIENTS_TEMPLATE = unless(
    why="is not taken from a client, for security: it would be a program that runs on the server. The model's own template is used; its "
    "variables are set by chat_template_kwargs"
)


def unsupported(param: str, why: str = "is not supported") -> InvalidRequest:
    """Of what a body asks for by this field, and nobody serves."""
    return InvalidRequest(f"{param} {why}", param=param, code="unsupported_parameter")


def refuse_unsupported(body: msgspec.Struct) -> None:
    """Raises InvalidRequest for the first field of an `unless` that asks for something."""
    for name, extra in _unsupported(type(body)).items():
        value = getattr(body, name)
        if value is not None and not any(_is_same(value, one) for one in extra["harmless"]):
            raise unsupported(name, extra["why"])


@functools.cache
def _unsupported(body: type[msgspec.Struct]) -> Mapping[str, Mapping[str, Any]]:
    info = msgspec.inspect.type_info(body)
    assert isinstance(info, msgspec.inspect.StructType)
    extras = {field.name: getattr(field.type, "extra", None) for field in info.fields}
    return {name: extra for name, extra in extras.items() if extra and "harmless" in extra}


def _is_same(value: Any, other: Any) -> bool:
    """As JSON has it: 0 is not false."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
