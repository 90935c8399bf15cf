"""Answers in the order in which vLLM generates them: given tokens are outputs like sampled ones."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ul2r.inference.plans import Plan


@dataclass(frozen=True)
class Sampled:
    """A sampled token of an answer.

    Attributes:
        token: The token.
        span: Number of its span.
        is_text: True if it belongs to the span's text.
    """

    token: int
    span: int
    is_text: bool


class AnswerWalk:
    """Place in an answer.

    The engine of this project feeds the tokens that a plan gives, such as the first sentinel. vLLM reads only prompts
    and what it has generated; a sentinel in the prompt would see, and be seen by, the tokens before it, as never in
    training. So given tokens are generated too, by leaving vLLM no choice.

    Attributes:
        plan: State of the answer.
        is_done: True after its last token.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.is_done = False
        self._given = deque(plan.begin())

    @property
    def given(self) -> int | None:
        """The token that must come next; None if it is sampled."""
        return self._given[0] if self._given else self.plan.forced_token()

    def push(self, token: int) -> Sampled | None:
        """Go on by a generated token; return it if it was sampled, or is scored as if it had been.

        Raises:
            RuntimeError: If it is not the one that was given.
        """
        if self.given is not None and token != self.given:
            raise RuntimeError(
                f"vLLM has generated token {token} where {self.given} was given: is its logits processor on?"
            )
        if self._given:
            self._given.popleft()
            return None
        span = len(self.plan.spans) - 1
        step = self.plan.accept(token)
        if step.feed:
            # The first one is the token itself.
            self._given.extend(step.feed[1:])
        else:
            self.is_done = True
        return Sampled(token, span, step.is_text)
