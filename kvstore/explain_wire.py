"""Messages about explanations: why a document is where it is, or no more."""

from __future__ import annotations

from .explain_view import ExplainView
from .message import Message


class ExplainDocument(Message, frozen=True):
    """Why is it where it is? Also of one that is no more, while it is remembered."""

    name: str


class Explained(Message, frozen=True):
    """This is why."""

    explanation: ExplainView
