"""Rows of tokens that a model scores or continues, in the form that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ul2r.config.few_shot import Prompting
from ul2r.errors import RequestError
from ul2r.evaluation.row_scoring import ScoringRow
from ul2r.inference import ExportMetadata, LanguageModel


@dataclass
class Truncation:
    """Count of contexts whose beginning was cut to fit the model.

    Attributes:
        num_requests: Requests with a context that was cut.
        num_tokens: Tokens that were cut.
        num_all: All requests.
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_all: int = 0

    def __add__(self, other: Truncation) -> Truncation:
        """Return the count of both."""
        return Truncation(
            self.num_requests + other.num_requests,
            self.num_tokens + other.num_tokens,
            self.num_all + other.num_all,
        )

    def to_dict(self) -> dict[str, int]:
        """Return plain values."""
        return asdict(self)

    def describe(self, max_length: int, part: str = "the beginning of their context") -> str | None:
        """Return a line for people that names the part that was cut, or None if nothing was."""
        if not self.num_requests:
            return None
        return (
            f"{self.num_requests} of {self.num_all} requests are longer than the model's {max_length} tokens: "
            f"{part} was cut, {self.num_tokens} tokens in all"
        )


def resolve_prompting(settings: Prompting, metadata: ExportMetadata) -> dict[str, Any]:
    """Return the settings of `Prompting` for a model, with every `auto` resolved, as plain values."""
    mode = settings.mode
    if mode == "auto":
        mode = "S2S" if metadata.denoising else "none"

    attention = settings.attention
    if attention == "auto":
        attention = metadata.attention if mode != "none" else "causal"

    sentinel = settings.sentinel
    if sentinel == "auto":
        sentinel = mode in ("NLU", "NLG") or (mode == "S2S" and metadata.prefix_sentinel)
    return {
        "mode": mode,
        "attention": attention,
        "sentinel": sentinel,
        "trailing_space": settings.trailing_space,
        "eos": settings.eos,
    }


class PromptForm:
    """Settings of `Prompting` for one model, with every `auto` resolved.

    Attributes:
        mode: Name of the mode, or "none".
        bidirectional: True if the context is read in both directions.
        sentinel: True if a sentinel closes the context and opens the targets.
        eos: True if an eos is scored after the targets.
        trailing_space: Side that spaces at the end of a context count for.
        truncation: Contexts that were cut so far.
    """

    def __init__(self, model: LanguageModel, settings: Prompting) -> None:
        """Resolve `settings`.

        Raises:
            RequestError: If the model lacks the mode or sentinel that is asked for.
        """
        self._model = model
        self._resolved = resolve_prompting(settings, model.metadata)
        self.mode = self._resolved["mode"]
        with_mode = self.mode != "none"
        # Also the check that the model has modes.
        self._mode = model.encode_mode(self.mode, f"mode {self.mode}") if with_mode else ()
        self.bidirectional = self._resolved["attention"] == "prefix"
        self.sentinel = self._resolved["sentinel"]
        self._sentinel: tuple[int, ...] = ()
        if self.sentinel:
            vocabulary = model.require_denoising("few_shot.sentinel=true")
            self._sentinel = (vocabulary.sentinels[0],)

        self.eos = settings.eos
        if settings.eos and not model.eos_token_ids:
            raise RequestError("eos=true: the model names no token that ends a text: leave it out")
        self._eos = (min(model.eos_token_ids),) if settings.eos else ()
        self._inputs_end = model.inputs_end if with_mode else ()
        self.trailing_space = settings.trailing_space
        self.truncation = Truncation()

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values, to be recorded with results."""
        return {
            **self._resolved,
            "rolling": "causal, without a mode",
            "truncated": self.truncation.to_dict(),
        }

    def build_row(self, context: Sequence[int], continuation: Sequence[int]) -> ScoringRow:
        """Return the row of a context and its continuation; cut the context's beginning if they are too long.

        Raises:
            RequestError: If the continuation alone is too long.
        """
        targets = (*continuation, *self._eos)
        # The last target is not read, so it needs no position.
        fixed = self._num_added + len(self._sentinel) + len(targets) - 1
        kept = self._cut(context, fixed, f"a continuation of {len(targets)} tokens")
        return ScoringRow(self._wrap(kept), self._sentinel, targets)

    def build_prompt(self, context: Sequence[int], max_tokens: int) -> tuple[list[int], list[int]]:
        """Return the tokens to continue, and the sentinel that opens what is written, if any.

        Args:
            context: Tokens of the context.
            max_tokens: Number of tokens that will be written.

        Raises:
            RequestError: If `max_tokens` leave no room for a context.
        """
        fixed = self._num_added + len(self._sentinel) + max_tokens
        kept = self._cut(context, fixed, f"max_gen_toks={max_tokens}")
        return list(self._wrap(kept)), list(self._sentinel)

    @property
    def _num_added(self) -> int:
        """Tokens of the inputs besides the context."""
        return len(self._mode) + len(self._sentinel) + len(self._inputs_end)

    def _wrap(self, context: Sequence[int]) -> tuple[int, ...]:
        # As in training: mode, text, sentinel, eos.
        return (*self._mode, *context, *self._sentinel, *self._inputs_end)

    def _cut(self, context: Sequence[int], fixed: int, what: str) -> Sequence[int]:
        """Return the end of a context that fits beside `fixed` other tokens, and count what is left out."""
        room = self._model.max_position_embeddings - fixed
        self.truncation.num_all += 1
        if room < 1:
            raise RequestError(
                f"{what} leaves no room for a context: the model reads {self._model.max_position_embeddings} tokens at "
                "most; leave the task out, or take a model of longer sequences"
            )
        if len(context) <= room:
            return context
        self.truncation.num_requests += 1
        self.truncation.num_tokens += len(context) - room
        return context[-room:]
