"""The first held-out gaps as a served model fills them: `ul2r serve` over HTTP, greedily, by index and not by taste.

    python benchmarks/served_gaps.py RECIPE --url http://127.0.0.1:8000 [--length 8] [--count 5]

RECIPE is a run's: the gaps are those that `ul2r evaluate RECIPE --suite gaps` measures, of one length and one slot; the
server is that of any model. Each gap is asked for by `/v1/completions` with the text before it and, as `suffix`, the
text after it. Prints a table in Markdown, then one JSON line:

    exact     gaps that were filled with just the masked text
    answers   what the model wrote
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import httpx
from tokenizers import Tokenizer

from ul2r.config import Recipe, load
from ul2r.config.named_recipes import find_recipe
from ul2r.data.document_tokenizer import decode_continuation
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import RecipeError, ServiceError
from ul2r.evaluation.gaps import select_gaps
from ul2r.launch.pretrained import fill_model_from_base
from ul2r.workflows.cli import run_and_report

NUM_SHOWN = 60
"""Characters of the text on each side that the table shows."""
NUM_MORE = 16
"""Tokens that an answer may be longer than its gap."""


def show(text: str) -> str:
    """Return a text as a cell of a table."""
    escaped = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{escaped}`" if escaped else "(nothing)"


def ask(url: str, request: dict[str, object]) -> str:
    """Return the text that a server answers.

    Raises:
        ServiceError: If it cannot be reached, or refuses.
    """
    try:
        response = httpx.post(url, json=request, timeout=600)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServiceError(f"{url}: {error}") from None
    if not response.is_success:
        raise ServiceError(f"{url}: status {response.status_code}: {response.text[:500]}")

    try:
        answer = response.json()["choices"][0]["text"]
    except (ValueError, LookupError, TypeError):
        answer = None
    if not isinstance(answer, str):
        raise ServiceError(f"{url}: no answer of a completions API: {response.text[:200]}")
    return answer


def run(options: argparse.Namespace) -> None:
    """Ask for each gap and print."""
    if options.count < 1:
        raise RecipeError(f"--count {options.count}: give 1 or more")
    recipe = load(find_recipe(options.recipe, Path()), options.set, Recipe, fill_model_from_base)
    dataset = open_dataset(recipe.storage_paths.store)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_file))
    groups = select_gaps(dataset, recipe.evaluation.gaps, recipe.objective.slot_length + 1)
    known = {group.length: group for group in groups if group.slots == 1}
    if options.length not in known:
        raise RecipeError(
            f"--length {options.length}: {recipe.name} measures gaps of {', '.join(map(str, known)) or 'no'} tokens "
            "with one slot (evaluation.gaps)"
        )
    group = known[options.length]

    head = "| | before the gap | the gap | the answer | after the gap |\n|---|---|---|---|---|\n"
    answers = []
    num_exact = 0
    for number in range(min(options.count, len(group))):
        before, after = (part[number].tolist() for part in group.parts)
        gap = group.gaps[number, 0].tolist()
        left = decode_continuation(tokenizer, [], before)
        target = decode_continuation(tokenizer, before, gap)
        right = decode_continuation(tokenizer, [*before, *gap], after)
        max_tokens = options.length + NUM_MORE
        request = {"prompt": left, "suffix": right, "max_tokens": max_tokens, "temperature": 0}
        answer = ask(f"{options.url}/v1/completions", request)
        answers.append(answer)
        num_exact += answer == target
        cells = (left[-NUM_SHOWN:], target, answer, right[:NUM_SHOWN])
        print(f"{'' if number else head}| {number} | {' | '.join(map(show, cells))} |")
    print(json.dumps({"benchmark": "served_gaps", "exact": num_exact, "answers": answers}))


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="YAML file, or a name that `ul2r recipes` lists")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--length", type=int, default=8, help="tokens of a gap")
    parser.add_argument("--count", type=int, default=5, help="gaps to fill")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of RECIPE")
    options = parser.parse_args()
    return run_and_report(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
