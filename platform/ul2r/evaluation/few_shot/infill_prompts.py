"""Texts with a gap in the form that a model reads: `both`, `fim` or `left`, as in `ul2r.evaluation.gaps.readings`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal

from ul2r.config.few_shot import FewShot
from ul2r.errors import RequestError
from ul2r.evaluation.few_shot.prompting import Truncation
from ul2r.evaluation.row_scoring import ScoringRow
from ul2r.inference import ExportMetadata, LanguageModel
from ul2r.inference.batch_generation import BatchRequest
from ul2r.inference.document_start import DocumentStart
from ul2r.inference.plans import CompletionPlan, InfillPlan, Plan
from ul2r.inference.sampling import SamplingSettings

NUM_FIM_SENTINELS = 3


@dataclass(frozen=True)
class InfillPrompt:
    """A text with a gap in tokens.

    Attributes:
        inputs: What the model reads at once.
        opener: Sentinel in front of the gap's text, if there is one.
        closers: Tokens that end it.
        before: Tokens of the left side, behind which it is decoded.
        held_back: White space at the end of the left side that the model writes itself: most tokenizers have it in one
            token with what follows, so a prompt that ends in it is like no text that the model knows.
    """

    inputs: tuple[int, ...]
    opener: tuple[int, ...]
    closers: tuple[int, ...]
    before: tuple[int, ...]
    held_back: str = ""

    def remove_held_back(self, text: str) -> str:
        """Return a written text without the white space that belongs to the left side, as far as it begins with it."""
        shared = commonprefix((text, self.held_back))  # noqa: RUF071  characters, as wanted
        return text[len(shared) :]


class InfillForm:
    """Settings of infilling for one model, with every `auto` resolved.

    Attributes:
        reading: What the model sees of a text.
        bidirectional: True if inputs are read in both directions.
        truncation: Texts that were cut so far.
    """

    def __init__(self, model: LanguageModel, start: DocumentStart, settings: FewShot) -> None:
        """Resolve `settings`.

        Raises:
            RequestError: If the model was not trained for what they ask for.
        """
        self._model = model
        self._start = start
        self._mode = settings.mode
        self._resolved = resolve_infilling(settings, model.metadata)
        self.reading = self._resolved["reading"]
        trained = list_readings(model.metadata)
        if self.reading not in trained:
            raise RequestError(
                f"evaluation.few_shot.reading={self.reading}: {model.metadata.run!r} was not trained for it: choose "
                f"{' or '.join(trained)}"
            )
        self.bidirectional = self._resolved["attention"] == "prefix"
        self.truncation = Truncation()

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values, to be recorded with results."""
        return {**self._resolved, "truncated": self.truncation.to_dict()}

    def build_prompt(self, left: str, right: str, mode: str, num_written: int) -> InfillPrompt:
        """Return the prompt of a text; cut it far from the gap if it is too long.

        Args:
            left: Text before the gap.
            right: Text behind it.
            mode: Mode of a UL2R model, unless the settings name one.
            num_written: Tokens that the gap may take.

        Raises:
            RequestError: If these leave no room for a text, or the model has no such mode.
        """
        model = self._model
        # The other readings are those of serving, which shows a text as it is.
        shown = left.rstrip() if self.reading == "left" else left
        before = [*self._start.prefix, *model.encode(shown)] if shown else []
        after = model.encode_continuation(right) if right else []
        if self.reading == "left":
            before, _ = self._cut(before or [self._start.empty], [], num_written)
            return InfillPrompt(
                inputs=tuple(before),
                opener=(),
                closers=tuple(sorted(model.eos_token_ids)),
                before=tuple(before),
                held_back=left[len(shown) :],
            )

        vocabulary = model.vocabulary
        assert vocabulary is not None
        sentinels = vocabulary.sentinels
        if self.reading == "fim":
            before, after = self._cut(before, after, num_written + NUM_FIM_SENTINELS)
            inputs = (sentinels[0], *before, sentinels[1], *after)
            return InfillPrompt(inputs, (sentinels[2],), (vocabulary.eos,), tuple(before))

        mode_tokens = model.encode_mode(mode if self._mode == "auto" else self._mode, "infilling")
        # A training input ends in a sentinel: that of the gap, or one more behind text.
        num_fixed = len(mode_tokens) + len(model.inputs_end) + 3
        before, after = self._cut(before, after, num_written + num_fixed)
        end = (sentinels[1],) if after else ()
        return InfillPrompt(
            inputs=(*mode_tokens, *before, sentinels[0], *after, *end, *model.inputs_end),
            opener=(sentinels[0],),
            closers=end or (vocabulary.eos,),
            before=tuple(before),
        )

    def _cut(
        self, before: Sequence[int], after: Sequence[int], num_fixed: int
    ) -> tuple[list[int], list[int]]:
        """Return the tokens next to the gap that fit with `num_fixed` others, and count what is left out."""
        room = self._model.max_position_embeddings - num_fixed
        self.truncation.num_all += 1
        if room < 1:
            raise RequestError(
                f"a gap of up to {num_fixed} tokens leaves no room for text: the model reads "
                f"{self._model.max_position_embeddings} tokens at most; leave the task out"
            )
        excess = len(before) + len(after) - room
        if excess <= 0:
            return list(before), list(after)
        self.truncation.num_requests += 1
        self.truncation.num_tokens += excess
        # Half of the room each, and what the shorter side does not need.
        num_after = min(len(after), max(room // 2, room - len(before)))
        num_before = room - num_after
        return list(before[len(before) - num_before :]), list(after[:num_after])


def resolve_infilling(settings: FewShot, metadata: ExportMetadata) -> dict[str, Any]:
    """Return the settings of infilling for a model, with every `auto` resolved, as plain values."""
    reading = list_readings(metadata)[0] if settings.reading == "auto" else settings.reading
    is_prefix = reading == "both" and settings.attention != "causal"
    mode = "of each task" if settings.mode == "auto" else settings.mode
    return {
        "reading": reading,
        "mode": mode if reading == "both" else "none",
        "attention": metadata.attention if is_prefix else "causal",
        "sentinel": False,
        "trailing_space": "continuation" if reading == "left" else "context",
        "eos": False,
    }


def list_readings(metadata: ExportMetadata) -> list[Literal["both", "fim", "left"]]:
    """Return the readings that a model was trained for, what shows it most first."""
    readings: list[Literal["both", "fim", "left"]] = []
    if metadata.denoising:
        readings.append("both")
    if metadata.fim:
        readings.append("fim")
    return [*readings, "left"]


def build_request(
    prompt: InfillPrompt,
    max_tokens: int,
    settings: SamplingSettings,
    is_complete: Callable[[Sequence[int]], bool],
) -> BatchRequest:
    """Return the request that writes a gap's text."""
    plan: Plan
    if prompt.opener:
        # As served: at least one token.
        plan = InfillPlan(prompt.opener, prompt.closers, max_tokens)
    else:
        plan = CompletionPlan(prompt.closers, max_tokens)
    return BatchRequest(
        tokens=prompt.inputs,
        plan=plan,
        num_positions=len(prompt.inputs) + len(prompt.opener) + max_tokens,
        settings=settings,
        is_complete=is_complete,
    )


def build_row(prompt: InfillPrompt, target: Sequence[int]) -> ScoringRow:
    """Return the row in which the true text is scored."""
    return ScoringRow(prompt.inputs, prompt.opener, tuple(target))
