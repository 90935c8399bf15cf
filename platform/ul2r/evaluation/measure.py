"""Evaluation of one run on held-out text, metric by metric."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ul2r.config import Denoiser, Evaluation, Recipe
from ul2r.config.denoisers import has_sentinels
from ul2r.config.evaluation import check_infill_length
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError
from ul2r.evaluation.fim_infilling import measure_fim_loss, measure_fim_match
from ul2r.evaluation.infilling import InfillExamples, measure_infill_loss, measure_infill_match
from ul2r.evaluation.losses import (
    measure_causal_loss,
    measure_denoiser_losses,
    measure_second_half_loss,
)
from ul2r.evaluation.scores import InfilledText, Score, Scores, to_perplexity
from ul2r.inference import LanguageModel
from ul2r.tracking.names import DENOISER_LOSS, KIND_LOSSES


@dataclass(frozen=True)
class Metric:
    """Name and display of a metric.

    Attributes:
        name: Its key in `Scores`; `ul2r.tracking.names.name_evaluation` turns it into the name in MLflow.
        label: For people, with its unit.
        higher_is_better: True if a higher score is better.
        digits: Number of decimals shown.
    """

    name: str
    label: str
    higher_is_better: bool = False
    digits: int = 3

    @property
    def title(self) -> str:
        """Label with an arrow in the direction of better scores."""
        return f"{self.label} {'↑' if self.higher_is_better else '↓'}"

    @property
    def short_label(self) -> str:
        """Label without its unit."""
        return self.label.partition(" (")[0]


def list_metrics(settings: Evaluation) -> tuple[Metric, ...]:
    """Return the metrics of `measure`, in its order."""
    return (
        Metric("causal_loss", "plain text, loss (nats/token)"),
        Metric("causal_perplexity", "plain text, perplexity", digits=1),
        Metric("second_half_loss", "second half given the first, loss (nats/token)"),
        *(metric for denoiser in settings.mixture for metric in _list_denoiser_metrics(denoiser)),
        Metric("infill_loss", "infilled span, loss (nats/token)"),
        Metric("infill_exact_match", "infilled span, exact match", higher_is_better=True),
        Metric("infill_edit_similarity", "infilled span, edit similarity", higher_is_better=True),
    )


def _list_denoiser_metrics(denoiser: Denoiser) -> Iterator[Metric]:
    name = denoiser.name
    yield Metric(f"{DENOISER_LOSS}{name}", f"denoiser {name}, loss (nats/token)")
    if has_sentinels(denoiser):
        # A quarter of the targets of short spans are sentinels, which tell where a span belongs, not its text.
        labels = {"text": "text alone", "sentinel": "sentinels alone"}
        for kind, beginning in KIND_LOSSES.items():
            label = f"denoiser {name}, {labels[kind]}, loss (nats/token)"
            yield Metric(f"{beginning}{name}", label)


def measure(
    model: LanguageModel,
    dataset: TokenDataset,
    recipe: Recipe,
    infilled: list[InfilledText] | None = None,
) -> Iterator[tuple[str, Score]]:
    """Yield the name and score of each metric as soon as it is measured, in the order of `list_metrics`.

    Args:
        model: The model.
        dataset: Its token store.
        recipe: Its recipe.
        infilled: List that some of the infilled spans are appended to.

    Raises:
        CheckpointError: If the model's vocabulary is not that of the token store.
        RecipeError: If an infilling example does not fit the rows that models are trained on.
        CorpusError: If the held-out split is too short.
    """
    # Before the first metric, since measuring takes minutes.
    _check_vocabulary(model, dataset, recipe)
    num_other_tokens = max(map(len, dataset.vocabulary.modes.values())) + len(model.inputs_end)
    check_infill_length(recipe.evaluation, recipe.objective, num_other_tokens)

    # Perplexity needs no pass of its own; its error follows from that of the loss.
    causal = measure_causal_loss(model, dataset, recipe)
    yield "causal_loss", causal
    yield "causal_perplexity", to_perplexity(causal)
    yield "second_half_loss", measure_second_half_loss(model, dataset, recipe)

    for denoiser in recipe.evaluation.mixture:
        scores = measure_denoiser_losses(model, dataset, recipe, denoiser)
        yield f"{DENOISER_LOSS}{denoiser.name}", scores.pop("all")
        for kind, score in scores.items():
            yield f"{KIND_LOSSES[kind]}{denoiser.name}", score

    examples = InfillExamples.build(dataset, recipe.evaluation)
    if model.metadata.fim and not model.metadata.denoising:
        loss = measure_fim_loss(model, examples, dataset.vocabulary)
        measure_match = measure_fim_match
    else:
        loss = measure_infill_loss(model, examples, dataset.vocabulary)
        measure_match = measure_infill_match
    yield "infill_loss", loss
    exact_match, edit_similarity = measure_match(model, examples, dataset.vocabulary, infilled)
    yield "infill_exact_match", exact_match
    yield "infill_edit_similarity", edit_similarity


def evaluate(model: LanguageModel, dataset: TokenDataset, recipe: Recipe) -> Scores:
    """Return the scores of all metrics; see `measure`."""
    return Scores(dict(measure(model, dataset, recipe)))


def _check_vocabulary(model: LanguageModel, dataset: TokenDataset, recipe: Recipe) -> None:
    if model.vocabulary != dataset.vocabulary:
        raise CheckpointError(
            f"run {recipe.name!r} was exported with another vocabulary than that of {recipe.storage_paths.store}: "
            "evaluate it with the token store it was trained on"
        )
