"""Answering: a question on its way through the runner, and what was told of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..ring_attention.text_stream import TextStream
from .engine import Answer
from .runner_queue import Job
from .runner_wire import AskRequest, Piece


@dataclass(slots=True)
class Answering:
    """A question on its way; `heard` tokens of the answer were told already."""

    job: Job
    request: AskRequest
    question: list[int]
    stream: TextStream
    heard: int = 0
    text: str = ""

    def hear(self, token: int) -> None:
        """The next token."""
        self.heard += 1
        self._tell(self.stream.push(token))

    def ended(self, tokens: Sequence[int]) -> str:
        """These are all: what was not told yet is. Returns the whole text."""
        for token in tokens[self.heard :]:
            self.hear(token)
        self._tell(self.stream.flush())
        return self.text

    def _tell(self, text: str) -> None:
        if text:
            self.text += text
            self.job.tell(Piece(text=text))


def ended(answer: Answer, eos: Sequence[int]) -> Answer:
    """An answer as far as its first end token."""
    kept = next((index + 1 for index, token in enumerate(answer.tokens) if token in eos), len(answer.tokens))
    return replace(answer, tokens=answer.tokens[:kept], logits=answer.logits[:kept])
