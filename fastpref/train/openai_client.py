"""Requests to a server with the OpenAI API through the package `openai`: what fails for a moment is asked again with
back-off, and every other way of failing is one line.

    client = Client("sampler", url, model, timeout=120, timeout_key="rounds.sampler_timeout",
                    model_key="rounds.sampler_model")
    answer = client.ask(lambda api: api.completions.create(model=model, prompt=..., ...))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from fastpref.errors import UserError, first_line

T = TypeVar("T")
R = TypeVar("R")
RETRIES = 5  # with the client's exponential back-off: about 15 s in all


class Answer(NamedTuple):
    """The one choice of a completion, or of a chat completion."""

    id: str
    text: str | None
    finish_reason: str


class Refused(UserError):
    """The server does not take the request as it is (400, 422)."""


class Client:
    def __init__(self, role: str, url: str, model: str, *, timeout: float | None, timeout_key: str,
                 model_key: str) -> None:
        """role: what the server is to us, with which messages begin. model: by which name it knows the model. The keys
        are those of the configuration that messages name. Raises UserError without the package `openai`."""
        self.name = f"{role} openai:{url}"
        try:
            import openai
        except ImportError:
            raise UserError(f"{self.name} takes the package openai: pip install openai") from None
        self.openai, self.model, self.timeout_key, self.model_key = openai, model, timeout_key, model_key
        self.api = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout,
                                 max_retries=RETRIES)

    def reach(self) -> None:
        """Raises UserError where no server answers at all; whether it knows the model shows when that is asked."""
        try:
            self.api.with_options(max_retries=1).models.list()
        except self.openai.APIConnectionError as error:
            why = first_line(error.__cause__ or error)
            raise self.wrong(f"cannot be reached ({why}): start it first") from error
        except (self.openai.OpenAIError, ValueError):
            pass  # something is there: not every server has this list

    def ask(self, create: Callable[[Any], Any]) -> Answer:
        """create: asks openai's client for one completion. Raises UserError for whatever is none; Refused where the
        server does not take the request."""
        try:
            answer = create(self.api)
        except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
            raise Refused(f"{self.name} refuses a prompt: {first_line(error)}") from error
        except self.openai.APIStatusError as error:
            raise self.wrong(f"fails after {RETRIES} retries, or refuses: {first_line(error)}") from error
        except self.openai.APITimeoutError as error:
            raise self.wrong(f"did not answer in {self.api.timeout:g} s, {RETRIES + 1} times "
                             f"({self.timeout_key})") from error
        except self.openai.APIConnectionError as error:
            why = first_line(error.__cause__ or error)
            raise self.wrong(f"cannot be reached, or ends in the middle of an answer ({why}): start it, and --resume "
                             "goes on") from error
        except (self.openai.OpenAIError, ValueError) as error:
            raise self.wrong(f"answers with what is no completion ({first_line(error)})") from error
        return self._choice(answer)

    def _choice(self, answer: Any) -> Answer:
        types = self.openai.types
        if not isinstance(answer, types.Completion | types.chat.ChatCompletion):
            raise self.wrong(f"answers with what is no completion ({str(answer)[:40]!r})")
        choices: Any = answer.choices or []
        if len(choices) != 1:
            raise self.wrong(f"answered with {len(choices)} responses where one was asked for")
        if answer.model != self.model and not answer.model.startswith(f"{self.model}@"):  # `transformers serve`: @main
            raise self.wrong(f"answered as model {answer.model!r}, not {self.model!r}: set {self.model_key}")
        text = choices[0].text if isinstance(answer, types.Completion) else getattr(choices[0].message, "content", None)
        return Answer(answer.id, text, choices[0].finish_reason)

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.name} {what}")


def at_once(concurrency: int, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of each, in their order, so many at a time; the first error ends what has not begun."""
    with ThreadPoolExecutor(concurrency) as pool:
        jobs = [pool.submit(work, item) for item in items]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
