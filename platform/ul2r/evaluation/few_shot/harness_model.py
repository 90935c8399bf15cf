"""A model of this platform, or any causal model in Hugging Face format, for lm-evaluation-harness 0.4.

    import ul2r.evaluation.few_shot.harness_model
    lm_eval.simple_evaluate("ul2r", "export=FOLDER,mode=S2S", tasks=["piqa"])

Contexts are read as `Prompting` says, by default as the model was trained: by a UL2R model in both directions, with a
mode in front. Few-shot examples are part of the context. Continuations are read causally by all models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Self, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import ValidationError

from ul2r.config.few_shot import Prompting
from ul2r.config.validation_errors import explain
from ul2r.console import show_progress
from ul2r.errors import RecipeError, RequestError
from ul2r.evaluation.few_shot.prompting import PromptForm
from ul2r.evaluation.few_shot.writing import WritingLimits, write_continuations
from ul2r.evaluation.row_scoring import ScoringRow, TargetScore, score_rows
from ul2r.inference import LanguageModel
from ul2r.inference.document_start import DocumentStart, read_document_start
from ul2r.model.huggingface.safetensors_reader import resolve_model_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")


@register_model("ul2r")
class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types that mypy reads
    """Model class `ul2r` of lm-evaluation-harness.

    Rows are batched by length, as many at once as memory allows, so that `batch_size` has no effect.

    Attributes:
        form: The settings, with every `auto` resolved, and the count of contexts that were cut.
    """

    def __init__(
        self,
        export: str = "",
        device: str | None = None,
        batch_size: int | str | None = None,  # noqa: ARG002  lm-eval passes it to every model
        max_batch_size: int | None = None,  # noqa: ARG002  lm-eval passes it to every model
        **settings: Any,  # noqa: ANN401  values of a command line
    ) -> None:
        """Load a model.

        Args:
            export: Folder of an export or of any causal model in Hugging Face format, or its name on the Hub.
            device: Where it computes; by default on a GPU if there is one.
            batch_size: No effect.
            max_batch_size: No effect.
            settings: Keys of `Prompting`.

        Raises:
            RecipeError: If a setting is wrong, or no model is named.
            RequestError: If the model lacks what the settings ask for.
            CheckpointError: If it cannot be loaded.
        """
        if not export:
            raise RecipeError("model_args: no model is named: add export=FOLDER")
        prompting = parse_settings(settings)
        folder = resolve_model_folder(export)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = LanguageModel.load(folder, device)
        self._set_up(model, read_document_start(folder, model.metadata), prompting)

    @classmethod
    def from_model(
        cls, model: LanguageModel, start: DocumentStart, prompting: Prompting | None = None
    ) -> Self:
        """Return the harness's view of a model that is loaded already."""
        harness_model = cls.__new__(cls)
        harness_model._set_up(model, start, prompting or Prompting())
        return harness_model

    def _set_up(self, model: LanguageModel, start: DocumentStart, prompting: Prompting) -> None:
        super().__init__()
        self._model = model
        self._start = start
        self._device = model.device
        self._prompting = prompting
        self.form = PromptForm(model, prompting)

    def copy_unused(self) -> Self:
        """Return another view of the same model, whose count of contexts that were cut begins anew."""
        return self.from_model(self._model, self._start, self._prompting)

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text, or else the one that stands for an empty context."""
        return min(self._model.eos_token_ids, default=self._start.empty)

    @property
    def prefix_token_id(self) -> int:
        """Token that stands for an empty context."""
        return self._start.empty

    @property
    def max_length(self) -> int:
        """Longest sequence of the model."""
        return self._model.max_position_embeddings

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval records with its results."""
        return {"run": self._model.metadata.run, **self.form.describe()}

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: Any,  # noqa: ANN401  keywords of other models
    ) -> list[int]:
        """Return the tokens of a text that begins a document; names of special tokens are encoded as plain text."""
        prefix = () if add_special_tokens is False else self._start.prefix
        return [*prefix, *self._model.encode(string)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and its continuation, which are tokenized as one text and then divided."""
        if self.form.trailing_space == "continuation":
            tokens: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return tokens
        whole = self.tok_encode(context + continuation)
        context_ids = self.tok_encode(context)
        return context_ids, whole[len(context_ids) :]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _, continuation_ids in requests:
            # Tokens that span the boundary can leave nothing behind it.
            if not continuation_ids:
                raise RequestError(
                    f"the continuation {continuation!r} has no token of its own behind {context[-40:]!r}: the task "
                    "cannot be scored with this tokenizer"
                )
        # A context of spaces alone leaves them to the continuation, and has no token.
        rows = [
            self.form.build_row(context or [self.prefix_token_id], target)
            for _, context, target in requests
        ]
        scores = self._score(rows, bidirectional=self.form.bidirectional, quiet=disable_tqdm)
        self._report_truncation()

        answers = [(score.log_probability, score.is_greedy) for score in scores]
        for (pair, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,
    ) -> list[float]:
        """Return the log-probability of each whole text: causally and without a mode, since there is no context."""
        if self.form.bidirectional or self.form.mode != "none":
            logger.warning(
                "whole texts are scored causally and without a mode: they have no context"
            )
        rows: list[ScoringRow] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, targets in map(make_disjoint_window, windows):
                rows.append(ScoringRow(tuple(context), (), tuple(targets)))
                owners.append(owner)

        totals = [0.0] * len(requests)
        scores = self._score(rows, bidirectional=False, quiet=disable_tqdm)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,
    ) -> list[str]:
        """Return the text that the model writes after each context."""
        answers: dict[int, str] = {}
        contexts = [
            (
                self.tok_encode(request.args[0]) or [self.prefix_token_id],
                WritingLimits.from_task(request.args[1]),
            )
            for request in requests
        ]
        written = write_continuations(self._model, self.form, contexts)
        for index, text in _show(written, len(requests), "write", quiet=disable_tqdm):
            answers[index] = text
            self.cache_hook.add_partial("generate_until", requests[index].args, text)
        self._report_truncation()
        return [answers[index] for index in range(len(requests))]

    def _score(
        self, rows: Sequence[ScoringRow], *, bidirectional: bool, quiet: bool
    ) -> list[TargetScore]:
        scores: dict[int, TargetScore] = {}
        batches = score_rows(self._model, rows, bidirectional=bidirectional)
        if quiet:
            scores.update(pair for batch in batches for pair in batch)
        else:
            with show_progress("score", len(rows), "requests") as bar:
                bar.update(0)
                for batch in batches:
                    scores.update(batch)
                    bar.update(len(scores))
        return [scores[index] for index in range(len(rows))]

    def _report_truncation(self) -> None:
        message = self.form.truncation.describe(self.max_length)
        if message is not None:
            logger.warning(message)


def parse_settings(settings: dict[str, Any]) -> Prompting:
    """Return the settings of a command line.

    Raises:
        RecipeError: If a key or value is wrong.
    """
    try:
        return Prompting.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(f"model_args: {explain(error, Prompting)}") from None


def _show(results: Iterable[T], total: int, description: str, *, quiet: bool) -> Iterable[T]:
    if quiet:
        yield from results
        return
    with show_progress(description, total, "requests") as bar:
        bar.update(0)
        for num_done, result in enumerate(results, start=1):
            yield result
            bar.update(num_done)
