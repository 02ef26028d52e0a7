"""Text to tokens: messages or a prompt become a `BackendInput` that fits the model's context, or an error that names the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec.structs import replace

from pipeline.answer_form import AUTO, PLAIN, AnswerForm, with_form
from pipeline.errors import ContextLengthExceeded, InvalidRequest
from pipeline.parsers.choose import template_of
from pipeline.protocol import BackendInput, OutputOptions, RoutingHints, SamplingOptions, StopConditions
from pipeline.tokenizer import Conversation, NoTokenizer, Tokenizer

MOST_DIGITS = 10  # of a token id; of thousands no number is made


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants beside the prompt; `stop.max_tokens` None means as many as the pool's default and the context allow."""

    stop: StopConditions = StopConditions()
    sampling: SamplingOptions = SamplingOptions()
    output: OutputOptions = OutputOptions()
    truncate_prompt_tokens: int | None = None  # the last so many tokens of the prompt; -1: as many as fit
    cache_salt: str | None = None


class Preprocessor:
    """Chat template, tokenizer and limits of one pool. Pure but for the tokenizer, and safe to call in threads.

    `model`: the pool's name as clients say it. `max_model_len`: prompt and output tokens together, at most. `max_choices`: answers to one
    prompt, which the engine has to run at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | NoTokenizer,
        *,
        model: str,
        max_model_len: int,
        default_max_tokens: int,
        max_choices: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.max_model_len = max_model_len
        self.default_max_tokens = default_max_tokens
        self.max_choices = max_choices

    def check_choices(self, choices: int, param: str) -> None:
        """Raises InvalidRequest for more answers to one prompt than the engine can run at once."""
        if choices > self.max_choices:
            raise InvalidRequest(
                f"{param} is {choices}, and model {self.model!r} makes at most {self.max_choices} choices of one prompt",
                param=param,
            )

    def chat(
        self, request_id: str, conversation: Conversation, wanted: Wanted, form: AnswerForm = PLAIN
    ) -> BackendInput:
        """A conversation by the model's chat template. Raises as `chat_prompt` does, and ContextLengthExceeded."""
        token_ids = self.chat_prompt(conversation, form)
        tokenizer, template = self._reader("messages"), template_of(self.tokenizer, form)
        if template is not None and tokenizer.shows_special(template.delimiters):
            wanted = replace(wanted, output=replace(wanted.output, skip_special_tokens=False))
        return with_form(self._assemble(request_id, token_ids, wanted, param="messages"), form)

    def chat_prompt(self, conversation: Conversation, form: AnswerForm = PLAIN) -> list[int]:
        """The tokens of a conversation, however many. Raises InvalidRequest: no template, or it refuses; tools that nobody could read from
        the answer."""
        tokenizer = self._reader("messages")
        if not tokenizer.has_chat_template:
            raise InvalidRequest(
                f"model {self.model!r} has no chat template, so it takes no messages: use /v1/completions",
                param="messages",
            )
        self._check_tools(tokenizer, form)
        return tokenizer.encode(tokenizer.render(conversation), add_special_tokens=False)

    def completion(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        wanted: Wanted,
        form: AnswerForm = PLAIN,
        *,
        param: str = "prompt",
    ) -> BackendInput:
        """A prompt as text or as token ids. Raises InvalidRequest and ContextLengthExceeded."""
        if isinstance(prompt, str):
            token_ids = self._reader(param).encode(prompt, add_special_tokens=True)
            return with_form(self._assemble(request_id, token_ids, wanted, param=param), form)
        ready = self._assemble(request_id, list(prompt), wanted, param=param)
        self.check_ids(prompt, param)  # after the length: there may be millions
        return with_form(ready, form)

    def _check_tools(self, tokenizer: Tokenizer, form: AnswerForm) -> None:
        read = tokenizer.response_format
        if form.tools and form.tool_choice == AUTO and (read is None or not read.has_calls):
            raise InvalidRequest(
                f"how model {self.model!r} writes calls is not known, so none could be read from its answer: set "
                f"pools.{self.model}.response_template, or tool_choice to required, none or a function",
                param="tools",
            )

    def embedding(self, given: str | list[int], param: str) -> list[int]:
        """Token ids of one input to be embedded, which may fill the whole context. Raises InvalidRequest and ContextLengthExceeded."""
        if not given:
            raise InvalidRequest("an input is empty: there is nothing to embed", param=param)
        if isinstance(given, str) and isinstance(self.tokenizer, NoTokenizer):
            raise InvalidRequest(
                f"model {self.model!r} is served without a tokenizer: send token ids as input", param=param
            )
        token_ids = self._reader(param).encode(given, add_special_tokens=True) if isinstance(given, str) else given
        if not 0 < len(token_ids) <= self.max_model_len:
            raise ContextLengthExceeded(
                f"model {self.model!r} takes 1 to {self.max_model_len} tokens; this input has {len(token_ids)}",
                param=param,
            )
        self.check_ids(token_ids, param)
        return token_ids

    def _reader(self, param: str) -> Tokenizer:
        """Who reads text. Raises InvalidRequest where nobody does."""
        if isinstance(self.tokenizer, NoTokenizer):
            raise InvalidRequest(
                f"model {self.model!r} is served without a tokenizer: send token ids as prompt to /v1/completions, "
                "without stop strings",
                param=param,
            )
        return self.tokenizer

    def _assemble(self, request_id: str, token_ids: list[int], wanted: Wanted, *, param: str) -> BackendInput:
        if wanted.stop.stop:
            self._reader("stop")
        self.check_ids(wanted.stop.stop_token_ids or [], "stop_token_ids")
        self._check_bias(wanted.sampling.logit_bias or {})
        token_ids = truncated(
            token_ids, wanted.truncate_prompt_tokens, self.max_model_len - (wanted.stop.max_tokens or 1)
        )
        max_tokens = self._fit(len(token_ids), wanted.stop.max_tokens, param)
        if (wanted.stop.min_tokens or 0) > max_tokens:
            raise InvalidRequest(f"min_tokens is more than the {max_tokens} tokens that may come", param="min_tokens")
        return BackendInput(
            request_id=request_id,
            model=self.model,
            token_ids=token_ids,
            stop_conditions=replace(wanted.stop, max_tokens=max_tokens),
            sampling_options=wanted.sampling,
            output_options=wanted.output,
            eos_token_ids=self.tokenizer.eos_token_ids,
            routing=RoutingHints(cache_salt=wanted.cache_salt) if wanted.cache_salt else None,
        )

    def _fit(self, prompt_tokens: int, max_tokens: int | None, param: str) -> int:
        """How many tokens may be generated."""
        if prompt_tokens == 0:
            raise InvalidRequest("the prompt has no tokens", param=param)
        remaining = self.max_model_len - prompt_tokens
        if remaining < (max_tokens or 1):
            asked = "leaves none for the answer" if max_tokens is None else f"{max_tokens} more are asked for"
            raise ContextLengthExceeded(
                f"model {self.model!r} has a context of {self.max_model_len} tokens; "
                f"the prompt has {prompt_tokens} and {asked}",
                param=param,
            )
        return min(self.default_max_tokens, remaining) if max_tokens is None else max_tokens

    def _check_bias(self, bias: Mapping[str, float]) -> None:
        size = self.tokenizer.vocab_size
        for token in bias:
            is_number = token.isascii() and token.isdecimal() and len(token) <= MOST_DIGITS
            if not (is_number and int(token) < size):
                raise InvalidRequest(
                    f"{token[:20]!r} is not a token id below {size}",
                    param=f"logit_bias.{token[:20]}",
                )

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raises InvalidRequest for the first id that is not in the model's vocabulary."""
        size = self.tokenizer.vocab_size
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < size:
                raise InvalidRequest(
                    f"token id {token_id} is outside the model's vocabulary of {size}", param=f"{param}[{position}]"
                )


def truncated(token_ids: list[int], asked: int | None, fits: int) -> list[int]:
    """The end of a prompt: the last `asked` tokens, or for -1 as many as fit; all of it where nothing is asked."""
    if asked is None or len(token_ids) <= (limit := max(0, fits) if asked < 0 else asked):
        return token_ids
    return token_ids[-limit:] if limit else []
