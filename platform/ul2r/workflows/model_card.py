"""The model card of an export, README.md: origin, held-out scores and recipe."""

from __future__ import annotations

from pathlib import Path

import yaml

from ul2r.config import HuggingFaceBase, Recipe
from ul2r.config.recorded_recipe import read_recorded_recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.evaluation.scores import Scores
from ul2r.evaluation.stored_scores import load_scores
from ul2r.filesystem import write_atomically
from ul2r.model.export_examples import write_examples
from ul2r.model.export_metadata import ExportMetadata
from ul2r.paths import EXPORT_METADATA_FILE, MODEL_CARD_FILE

SCORES_HEADING = "## Held-out text"
RECIPE_HEADING = "## Recipe"

LOCAL_SECTIONS = ("storage", "base", "tracking", "checkpoints", "export", "launch", "profile")
"""Parts of a recipe with folders, addresses and resources."""
LOCAL_DATA = ("corpus", "tokenizer", "blend", "pairs")

SETUP = """```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

MODEL = "."  # this folder, its path, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
inputs = tokenizer("Once upon a time", return_tensors="pt")
```"""
PREFIX_USE = f"""## Use

**This model reads a prompt in both directions.** It was trained as a prefix language model (UL2R, arXiv 2210.11399):
the tokens of a prompt see each other, generated ones see all before them. `generate()` of transformers does that with
the `custom_generate` of this folder, a few hundred lines of Python on top of transformers; `trust_remote_code=True`
lets them run, so read them first.

{SETUP}

```python
tokens = model.generate(**inputs, custom_generate=MODEL, trust_remote_code=True, max_new_tokens=40)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

It adds the mode `S2S`, which continues a text; `mode="NLU"` and `mode="NLG"` continue it by a short and by a long span.
Several prompts are padded on the left, and sampling, beams, stop strings, streamers and caches are those of
transformers. Slots anywhere in a text are filled with what is on both sides of them as context:

```python
parts = ["def area(", "):\\n    return width * height\\n\\nprint(area(", "))"]  # a slot between each two parts
tokens = model.generate(
    parts=parts, tokenizer=tokenizer, custom_generate=MODEL, trust_remote_code=True, max_new_tokens=8
)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

`max_new_tokens` is then for each slot. `AutoTokenizer` takes the class of some families (Qwen), which splits text by
rules of its own, not by those of tokenizer.json.

**Without `custom_generate` transformers reads prompts causally and without a mode, and says nothing.** The model
works, but not as it was trained, and there are no slots; how much worse its text is differs from model to model and
has to be measured. Every engine without prefix-LM attention reads it so. The same prompts over HTTP, with all of the
above: `ul2r serve FOLDER`.
"""
CAUSAL_USE = f"""## Use

The model reads a prompt causally, as transformers and other engines do.

{SETUP}

```python
tokens = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```
"""
CAUSAL_DENOISING_USE = """
It was trained on denoisers (UL2R, arXiv 2210.11399): `custom_generate` adds the mode that a prompt began with in
training, and fills slots anywhere in a text. It is Python that `trust_remote_code=True` lets run, so read it first.

```python
tokens = model.generate(**inputs, custom_generate=MODEL, trust_remote_code=True, max_new_tokens=40)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

parts = ["def area(", "):\\n    return width * height\\n"]  # a slot between each two parts
tokens = model.generate(
    parts=parts, tokenizer=tokenizer, custom_generate=MODEL, trust_remote_code=True, max_new_tokens=8
)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```
"""


def write_card(
    folder: Path, recipe: Recipe, dataset: TokenDataset, metadata: ExportMetadata
) -> None:
    """Write the card of an export, with the scores of its run if there are any yet, and examples for the server."""
    sections = [
        _write_header(recipe),
        f"# {recipe.name}",
        f"{_describe_origin(metadata)} Attention over inputs is {metadata.attention}; `{EXPORT_METADATA_FILE}` holds "
        "modes, sentinels and the checkpoint's identity.",
        describe_use(metadata).rstrip(),
        "## Training",
        f"Token store: fingerprint `{dataset.manifest.fingerprint}`, tokenizer `{dataset.manifest.tokenizer}`.",
        f"{RECIPE_HEADING}\n\n```yaml\n{_dump_settings(read_recorded_recipe(recipe))}```\n",
    ]
    # The recipe is last: `_insert` finds its heading and puts the scores in front of it.
    text = "\n\n".join(sections)
    # The run's scores are those of its last checkpoint, not of one that `export.checkpoint` names.
    scores = None if recipe.export.checkpoint else load_scores(recipe, dataset)

    _write_if_changed(folder / MODEL_CARD_FILE, text if scores is None else _insert(text, scores))
    if scores is not None and scores.examples:
        write_examples(folder, scores.examples)


def _write_header(recipe: Recipe) -> str:
    """Return the YAML that the Hub reads."""
    fields: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = recipe.base
    # A folder is of this machine: the Hub would take it for a name.
    if isinstance(base, HuggingFaceBase) and not Path(base.hf).expanduser().is_dir():
        fields["base_model"] = base.hf
    fields["tags"] = ["ul2r", "custom_generate"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _dump_settings(recipe: Recipe) -> str:
    """Return the recipe as YAML without what is of the machine it ran on: a card may be published."""
    tree = recipe.model_dump(mode="json", exclude=set(LOCAL_SECTIONS))
    for key in LOCAL_DATA:
        del tree["data"][key]
    del tree["evaluation"]["data"]
    return yaml.safe_dump(tree, sort_keys=False)


def describe_use(metadata: ExportMetadata) -> str:
    """Return the part of a card that says how to use a model, with code."""
    if metadata.attention == "prefix":
        return PREFIX_USE
    return CAUSAL_USE + (CAUSAL_DENOISING_USE if metadata.denoising else "")


def add_scores(folder: Path, scores: Scores) -> None:
    """Put scores into the card of an export, if it has one, and examples into a file for the server.

    Examples are held-out text of the corpus, which a card that may be published does not show.
    """
    if scores.examples:
        write_examples(folder, scores.examples)
    path = folder / MODEL_CARD_FILE
    if path.is_file():
        _write_if_changed(path, _insert(path.read_text(encoding="utf-8"), scores))


def _describe_origin(metadata: ExportMetadata) -> str:
    if not metadata.step:
        return "Converted from a Megatron-LM checkpoint, without further training."
    return (
        f"Step {metadata.step:,} of a run on {metadata.tokens:,} row positions and {metadata.flops:.3g} training "
        "FLOPs, including those of the runs that it continues."
    )


def _insert(text: str, scores: Scores) -> str:
    """Return a card's text with the scores in front of the recipe."""
    # A card that somebody has edited may have no recipe any more: scores then go to its end.
    before, heading, recipe = text.partition(RECIPE_HEADING)
    before = before.split(SCORES_HEADING)[0]  # drops older scores
    rows = [
        f"| {name} | {score.format(4).replace(' ± ', ' | ')} |"
        for name, score in scores.values.items()
    ]
    section = "\n".join(
        [SCORES_HEADING, "", "| metric | mean | standard error |", "|---|---|---|", *rows]
    )
    return f"{before}{section}\n\n{heading}{recipe}"


def _write_if_changed(path: Path, text: str) -> None:
    # The file of an unchanged card keeps its modification time: a repeated export then changes nothing.
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    write_atomically(path, text)
