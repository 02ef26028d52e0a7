"""Which parser reads the answer of a request."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.answer_form import NONE, REQUIRED, AnswerForm
from pipeline.parsers.forced import NamedCall, RequiredCalls
from pipeline.parsers.templated import ResponseFormat, TemplatedParser
from pipeline.parsing import Parser
from pipeline.tokenizer import NoTokenizer, Tokenizer

FIRST_LOOK_TOKENS = (
    64  # of a prompt's end, where the assistant's message begins; four times as many while it is not found
)


def parsers_of(
    tokenizer: Tokenizer | NoTokenizer, form: AnswerForm, prompt: Sequence[int], n: int
) -> list[Parser] | None:
    """One for each choice of a chat; None where all text is content."""
    if form.has_forced_call:
        required = form.tool_choice == REQUIRED
        return [RequiredCalls() if required else NamedCall(form.tools[0]["function"]["name"]) for _ in range(n)]
    template = template_of(tokenizer, form)
    if template is None or isinstance(tokenizer, NoTokenizer):
        return None
    prefix = message_start(tokenizer, template, prompt)
    tools = [] if form.tool_choice == NONE else form.tools
    return [TemplatedParser(template, prefix, tools, reasons=form.shows_reasoning) for _ in range(n)]


def template_of(tokenizer: Tokenizer | NoTokenizer, form: AnswerForm) -> ResponseFormat | None:
    """The template that the answer is read by: where it may hold reasoning or calls."""
    template = None if isinstance(tokenizer, NoTokenizer) else tokenizer.response_format
    if template is None or form.has_forced_call:
        return None
    calls = template.has_calls and form.tools and form.tool_choice != NONE
    return template if template.has_reasoning or calls else None


def message_start(tokenizer: Tokenizer, template: ResponseFormat, prompt: Sequence[int]) -> str:
    """The end of the prompt that holds the start of the assistant's message, all of it where it is nowhere."""
    length = FIRST_LOOK_TOKENS
    while True:
        text = tokenizer.decode(prompt[-length:], skip_special_tokens=False)
        if length >= len(prompt) or template.holds_anchor(text):
            return text
        length *= 4
