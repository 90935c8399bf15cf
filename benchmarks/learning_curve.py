"""Scores of runs over their checkpoints: held-out gaps, plain text and denoisers, paired with the base's.

    python benchmarks/learning_curve.py COMPARISON [--arms NAME ...] [--num-gaps 512] [--output FOLDER]

COMPARISON is a recipe of runs and of a Hugging Face model named base, such as smollm2-compare. The base and each
checkpoint of each run are measured in every reading that they were trained for (`ul2r.evaluation.gaps`), on the same
gaps, without Ray and MLflow; on a GPU if there is one. Finished measurements are kept in OUTPUT (default: the
comparison's storage, curve/), so arms can be measured by several processes at once, and an interrupted call goes on.

Writes OUTPUT/curve.csv, with the columns

    arm, step, tokens, flops   of the checkpoint; tokens are those after the base, FLOPs too
    metric, reading            reading: of gaps left, both or fim; of other metrics empty
    mean, stderr               nats per token
    base_difference, base_difference_stderr   of gaps: to the base that reads the left side, paired by text

and OUTPUT/curve.png, and prints one JSON line: the last rows of each arm, and `crossings`, the tokens at which an arm's
both-sided reading overtakes its own left side and the base's, by a line (`ul2r.evaluation.crossing`); None: never.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from ul2r.config import Comparison, HuggingFaceBase, Recipe, load
from ul2r.config.gaps import GapSettings
from ul2r.config.named_recipes import find_recipe
from ul2r.data.sampling.held_out_windows import MIN_MEASURED
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.errors import CheckpointError, RecipeError
from ul2r.evaluation.comparison import check_comparable
from ul2r.evaluation.crossing import extrapolate_crossing
from ul2r.evaluation.few_shot.task_outcome import digest_settings
from ul2r.evaluation.gaps import GapGroup, measure_gaps, select_gaps
from ul2r.evaluation.losses import (
    measure_causal_loss,
    measure_denoiser_loss,
    measure_second_half_loss,
)
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.evaluation.scores import Score
from ul2r.evaluation.stored_scores import evaluation_settings
from ul2r.filesystem import write_atomically
from ul2r.inference import LanguageModel
from ul2r.inference.pretrained import PretrainedModel
from ul2r.launch.logs import configure_console
from ul2r.launch.pretrained import fill_model_from_base
from ul2r.train.checkpoint.layout import parse_step
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import CheckpointStore
from ul2r.workflows.cli import run_and_report
from ul2r.workflows.export import export

BASE = "base"
GAPS = GapSettings(lengths=(3, 8, 16), slots=(1,), generate=False)
READINGS = {"left": "left side", "both": "both sides", "fim": "both sides, by FIM"}


@dataclass(frozen=True)
class Point:
    """Scores of one checkpoint.

    Attributes:
        arm: Its arm.
        step: Its step; 0 is the base.
        checkpoint: Id of the checkpoint; of the base the digest of its weights.
        tokens: Row positions that it was trained on after the base.
        flops: Training FLOPs after the base.
        scores: Mean, standard error and count by metric and reading, as in "gap 8 tokens|both".
        texts: Mean loss of each text by metric and reading, of gaps only.
        conditions: Digest of the gaps, the text and the settings of the evaluation.
    """

    arm: str
    step: int
    checkpoint: str
    tokens: int
    flops: float
    scores: dict[str, list[float]]
    texts: dict[str, list[float]]
    conditions: str

    def write(self, folder: Path) -> None:
        """Write the point to its file."""
        text = json.dumps(vars(self)) + "\n"
        write_atomically(folder / f"{self.arm}-{self.step:08d}.json", text)

    @classmethod
    def read_all(cls, folder: Path) -> list[Point]:
        """Return the points of a folder, by arm and step."""
        files = sorted(folder.glob(f"*-{'[0-9]' * 8}.json"))
        return [cls(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def measure_model(
    model: LanguageModel, recipe: Recipe, dataset: TokenDataset, groups: tuple[GapGroup, ...]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return `Point.scores` and `Point.texts` of a model."""
    scores: dict[str, Score] = {}
    texts: dict[str, list[float]] = {}
    for gap in measure_gaps(model, groups):
        name = f"gap {gap.length} tokens|{gap.reading}"
        for metric, score in gap.summarize().items():
            scores[name if metric == "loss" else f"{name}|{metric}"] = score
        texts[name] = gap.losses.mean(axis=(1, 2)).tolist()

    scores["plain text|"] = measure_causal_loss(model, dataset, recipe)
    scores["second half|"] = measure_second_half_loss(model, dataset, recipe)
    for denoiser in recipe.evaluation.mixture:
        scores[f"denoiser {denoiser.name}|"] = measure_denoiser_loss(
            model, dataset, recipe, denoiser
        )
    return {name: [s.mean, s.stderr, s.count] for name, s in scores.items()}, texts


def iter_points(
    arm: str, recipe: Recipe, groups: tuple[GapGroup, ...], conditions: str, finished: set[str]
) -> Iterator[Point]:
    """Yield the points of a run that are not finished yet."""
    dataset = open_dataset(recipe.storage_paths.store)
    checkpoints = CheckpointStore.from_recipe(recipe).list_checkpoints()
    if not checkpoints:
        raise CheckpointError(
            f"run {recipe.name!r} has no checkpoint in {recipe.paths.folder}: train it first, or choose --arms"
        )
    for checkpoint in checkpoints:
        step = parse_step(checkpoint.name)
        # By its id: the same step of a run that was trained again is another checkpoint.
        checkpoint_id = CheckpointInfo.read(checkpoint).checkpoint_id
        if step is None or checkpoint_id in finished:
            continue
        before = set(recipe.paths.folder.iterdir())
        folder = export(_without_publication(recipe, checkpoint))
        model = LanguageModel.load(folder, get_device())
        scores, texts = measure_model(model, recipe, dataset, groups)
        tokens = model.metadata.tokens
        flops = model.metadata.flops
        assert tokens is not None
        assert flops is not None
        yield Point(arm, step, checkpoint_id, tokens, flops, scores, texts, conditions)
        # Half a gigabyte each.
        if folder not in before:
            shutil.rmtree(folder)


def _without_publication(recipe: Recipe, checkpoint: Path) -> Recipe:
    """Return the recipe that exports a checkpoint and tells nobody."""
    update = {"checkpoint": checkpoint, "registered_model": None, "push_to_hub": None}
    return recipe.model_copy(
        update={
            "export": recipe.export.model_copy(update=update),
            "tracking": recipe.tracking.model_copy(update={"uri": "none"}),
        }
    )


def digest_conditions(recipe: Recipe, dataset: TokenDataset, groups: tuple[GapGroup, ...]) -> str:
    """Return a digest of all that scores depend on besides the model."""
    settings = evaluation_settings(recipe)
    del settings["storage"]  # a moved storage has the same text, by its fingerprint
    hashes = [group.hashes for group in groups]
    return digest_settings(dataset.manifest.fingerprint, settings, hashes)


def select_current(points: list[Point], ids: Mapping[str, set[str]]) -> list[Point]:
    """Return the points whose arm has their checkpoint, or has none here at all, and say how many others there are."""
    current = [
        point for point in points if not ids.get(point.arm) or point.checkpoint in ids[point.arm]
    ]
    if len(current) < len(points):
        gone = len(points) - len(current)
        print(f"left out {gone} points of checkpoints that are gone", file=sys.stderr)
    return current


def list_checkpoint_ids(recipe: Recipe) -> set[str]:
    """Return the ids of a run's checkpoints."""
    checkpoints = CheckpointStore.from_recipe(recipe).list_checkpoints()
    return {CheckpointInfo.read(checkpoint).checkpoint_id for checkpoint in checkpoints}


def get_device() -> str:
    """Return the device that models are measured on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_base(
    base: PretrainedArm, recipe: Recipe, groups: tuple[GapGroup, ...], conditions: str
) -> Point:
    """Return the scores of the base as it is."""
    dataset = open_dataset(recipe.storage_paths.store)
    model = PretrainedModel.load_with_vocabulary(
        base.model_folder, dataset.vocabulary, dataset.tokenizer_file, get_device()
    )
    scores, texts = measure_model(model, recipe, dataset, groups)
    return Point(BASE, 0, base.digest, 0, 0.0, scores, texts, conditions)


def write_csv(points: list[Point], file: Path) -> list[dict[str, Any]]:
    """Write curve.csv and return its rows."""
    base = next(point for point in points if point.arm == BASE)
    rows = []
    for point in points:
        for name, (mean, stderr, _) in point.scores.items():
            metric, reading, *part = name.split("|")
            row: dict[str, Any] = {
                "arm": point.arm,
                "step": point.step,
                "tokens": point.tokens,
                "flops": f"{point.flops:.4g}",
                "metric": "|".join([metric, *part]),
                "reading": reading,
                "mean": f"{mean:.4f}",
                "stderr": f"{stderr:.4f}",
            }
            if name in point.texts:
                differences = np.subtract(point.texts[name], base.texts[f"{metric}|left"])
                error = differences.std(ddof=1) / len(differences) ** 0.5
                row["base_difference"] = f"{differences.mean():.4f}"
                row["base_difference_stderr"] = f"{error:.4f}"
            rows.append(row)
    with file.open("w", encoding="utf-8", newline="") as stream:
        columns = [*rows[0], "base_difference", "base_difference_stderr"]
        writer = csv.DictWriter(stream, dict.fromkeys(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def list_crossings(points: list[Point]) -> list[dict[str, Any]]:
    """Return where both-sided readings of gaps overtake the left side, for arms with two checkpoints or more."""
    base = next(point for point in points if point.arm == BASE)
    crossings = []
    for arm in sorted({point.arm for point in points} - {BASE}):
        own = [point for point in points if point.arm == arm]
        tokens = [point.tokens for point in own]
        for length, reading in product(GAPS.lengths, ("both", "fim")):
            name, left = (f"gap {length} tokens|{key}" for key in (reading, "left"))
            if len(own) < 2 or name not in own[0].texts:
                continue
            for opponent in ("own left", "base's left"):
                is_own = opponent == "own left"
                differences = [
                    np.subtract(point.texts[name], (point if is_own else base).texts[left])
                    for point in own
                ]
                crossing = extrapolate_crossing(tokens, differences)
                crossings.append(
                    {"arm": arm, "gap": length, "reading": reading, "against": opponent}
                    | crossing.to_dict()
                )
    return crossings


def plot(points: list[Point], file: Path) -> None:
    """Draw the losses of gaps, of plain text, of second halves and of S over tokens."""
    gaps = [f"gap {length} tokens" for length in GAPS.lengths]
    metrics = [*gaps, "plain text", "second half", "denoiser S"]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    base = next(point for point in points if point.arm == BASE)
    arms = sorted({point.arm for point in points} - {BASE})
    # Where a line is drawn for an arm and reading, it looks the same in every panel.
    drawn: dict[str, Any] = {}
    for axes, metric in zip(figure.subplots(2, 3).flat, metrics, strict=True):
        start = base.scores.get(f"{metric}|left") or base.scores[f"{metric}|"]
        drawn["base as it is"] = axes.axhline(start[0], color="black", linewidth=0.8)
        for (index, arm), reading in product(enumerate(arms), ("left", "both", "fim", "")):
            name = f"{metric}|{reading}"
            own = [point for point in points if point.arm == arm and name in point.scores]
            if not own:
                continue
            label = f"{arm}, {READINGS[reading]}" if reading else arm
            drawn[label] = axes.errorbar(
                [point.tokens / 1e6 for point in own],
                [point.scores[name][0] for point in own],
                [point.scores[name][1] for point in own],
                linestyle=":" if reading == "left" else "-",
                color=f"C{index}",
                marker="o",
                markersize=3,
                capsize=2,
                elinewidth=0.5,
            )
        axes.set_title(metric)
        axes.set_xlabel("tokens after the base (millions)")
        axes.set_ylabel("loss (nats per token)")
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=110)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", help="YAML file, or a name that `ul2r recipes` lists")
    parser.add_argument("--arms", nargs="+", help="arms to measure (default: all)")
    parser.add_argument("--num-gaps", type=int, default=512, help="gaps of each length")
    parser.add_argument("--output", type=Path, help="default: curve/ in the comparison's storage")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of recipes"
    )
    return parser.parse_args()


def read_arms(options: argparse.Namespace) -> tuple[dict[str, Recipe], PretrainedArm, Path]:
    """Return the runs, the base and the folder of the curve after a check of all options."""
    comparison = load(find_recipe(Path(options.comparison), Path()), [], Comparison)
    recipes = {
        arm: load(entry, options.set, Recipe, fill_model_from_base)
        for arm, entry in comparison.recipes.items()
        if isinstance(entry, Path)
    }
    base = comparison.recipes.get(BASE)
    if not isinstance(base, HuggingFaceBase):
        raise RecipeError(
            "recipes.base should be a model as it is, {hf: FOLDER}: gaps are paired with its"
        )
    check_comparable(recipes, {BASE: base})
    if unknown := set(options.arms or ()) - {BASE, *recipes}:
        raise RecipeError(
            f"--arms {', '.join(sorted(unknown))}: known are {', '.join((BASE, *recipes))}"
        )
    if options.num_gaps < MIN_MEASURED:
        raise RecipeError(f"--num-gaps {options.num_gaps}: give {MIN_MEASURED} or more")

    output: Path = options.output or comparison.storage / "curve"
    if output.exists() and not output.is_dir():
        raise RecipeError(f"--output {output} is a file: name a folder")
    folder = Path(base.hf).expanduser()
    return recipes, PretrainedArm.from_folder(base.hf, folder, comparison.storage), output


def run(options: argparse.Namespace) -> None:
    """Measure what is missing, then write the curve of all that is there."""
    recipes, base, output = read_arms(options)
    any_recipe = next(iter(recipes.values()))
    dataset = open_dataset(any_recipe.storage_paths.store)
    groups = select_gaps(dataset, GAPS.model_copy(update={"num_gaps": options.num_gaps}))
    conditions = digest_conditions(any_recipe, dataset, groups)
    output.mkdir(parents=True, exist_ok=True)
    if any(point.conditions != conditions for point in Point.read_all(output)):
        raise RecipeError(
            f"{output} has points of another text, other gaps or settings than --num-gaps {options.num_gaps} and --set "
            "ask for: choose another --output"
        )

    ids = {arm: list_checkpoint_ids(recipe) for arm, recipe in recipes.items()}
    ids[BASE] = {base.digest}
    for arm in options.arms or (BASE, *recipes):
        finished = {point.checkpoint for point in Point.read_all(output) if point.arm == arm}
        if arm != BASE:
            measured = iter_points(arm, recipes[arm], groups, conditions, finished)
        elif base.digest in finished:
            continue
        else:
            measured = iter((measure_base(base, any_recipe, groups, conditions),))
        for point in measured:
            point.write(output)
            gaps = {k: round(v[0], 3) for k, v in point.scores.items() if k.count("|") == 1}
            print(f"{arm} {point.step}: {json.dumps(gaps)}", file=sys.stderr, flush=True)

    points = select_current(Point.read_all(output), ids)
    if not any(point.arm == BASE for point in points):
        print("no curve yet: the base is not measured, see --arms", file=sys.stderr)
        return
    rows = write_csv(points, output / "curve.csv")
    mpl.use("Agg")
    plot(points, output / "curve.png")
    last = {point.arm: point.step for point in points}
    shown = [row for row in rows if row["step"] == last[row["arm"]] and "|" not in row["metric"]]
    result = {"device": get_device(), "rows": shown, "crossings": list_crossings(points)}
    print(json.dumps({"benchmark": "learning_curve"} | result))


if __name__ == "__main__":
    configure_console()
    options = parse_options()
    sys.exit(run_and_report(lambda: run(options)))
