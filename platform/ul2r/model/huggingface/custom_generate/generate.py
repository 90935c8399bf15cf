"""Generation with prompts that are read in both directions, and with slots in a text that are filled.

    inputs = tokenizer("Once upon a time", return_tensors="pt")
    model.generate(**inputs, custom_generate=MODEL, trust_remote_code=True, max_new_tokens=40)

    parts = ["The capital of", " is Paris, that of", " is Rome."]  # a slot between each two
    model.generate(parts=parts, tokenizer=tokenizer, custom_generate=MODEL, trust_remote_code=True)

The model was trained as a prefix language model (UL2R, arXiv 2210.11399): tokens of a prompt see each other in both
directions, generated tokens see all before them. generate() of transformers would read the prompt causally. Everything
else is its own: sampling, beams, caches, stopping, streaming. Written for transformers 5.23.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ul2r.model.huggingface.custom_generate.encode import encode_parts
from ul2r.model.huggingface.custom_generate.prefix_mask import PrefixMask
from ul2r.model.huggingface.custom_generate.settings import SETTINGS
from ul2r.model.huggingface.custom_generate.slots import SlotFiller, Slots, SlotsFilled, TextOnly

Mode = Literal["S2S", "NLU", "NLG"]

DEFAULT_SLOT_TOKENS = 64
WHOLE_PROMPT = ("inputs_embeds", "past_key_values", "prefill_chunk_size")


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: PreTrainedModel,
    mode: Mode | None = None,
    parts: Sequence[str] | Sequence[Sequence[str]] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **kwargs: Any,  # noqa: ANN401  as for generate()
) -> Tensor | ModelOutput:
    """Continue prompts, or fill the slots between parts of texts.

    Args:
        inputs: Tokens of the prompts, (B, S), padded on the left, as for generate(); or `input_ids`. The mode, and what
            closes a prompt in training, is added here and not returned.
        generation_config: As for generate().
        model: The model.
        mode: S2S continues a text, and is the default. NLU and NLG were trained on short, and on long or many, spans;
            NLU is the default of slots. A model that was not trained on denoisers takes none.
        parts: n + 1 texts around n slots, or several texts of such parts, in place of `inputs`. The first part and
            the last may be empty.
        tokenizer: The model's tokenizer; needed for `parts`, and for generate()'s stop_strings.
        kwargs: As for generate(). With `parts`, `max_new_tokens` is for each slot: 64, or fewer where fewer fit.

    Returns:
        As generate(): prompts with their continuations. With `parts`, the texts with slots filled, padded on the
        right, and with return_dict_in_generate also `fills`, the tokens of each slot of each text.

    Raises:
        ValueError: If the prompts cannot be read in both directions, or do not fit the model.
    """
    for name in ("custom_generate", "trust_remote_code"):
        kwargs.pop(name, None)
    for name in WHOLE_PROMPT:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: a prompt is read as a whole, from its tokens: leave it out")
    # What is None would be taken from the model's own settings, which name these tokens for the causal generate().
    kwargs.setdefault("suppress_tokens", [])
    config = copy.deepcopy(generation_config)
    input_ids = kwargs.pop("input_ids", None)
    tokens = inputs if input_ids is None else input_ids

    if parts is None:
        if tokens is None or tokens.ndim != 2 or not tokens.numel():
            raise ValueError("there is no prompt: give tokens, (B, S), or parts with a tokenizer")
        if tokenizer is not None:
            kwargs["tokenizer"] = tokenizer
        return _continue(model, tokens, mode, config, kwargs)
    if tokens is not None:
        raise ValueError("parts: give either parts or tokens, not both")
    if tokenizer is None:
        raise ValueError("parts: give the model's tokenizer as well: tokenizer=tokenizer")
    documents = _list_documents(parts)
    return _fill(model, documents, tokenizer, mode or "NLU", (config, kwargs))


def _list_documents(parts: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the parts of each text: a text is the parts of one document, several are lists of parts."""
    documents: list[list[str]] = []
    if not isinstance(parts, str):
        texts = [part for part in parts if isinstance(part, str)]
        documents = [texts] if texts else [list(part) for part in parts]
    if not documents or not all(documents):
        raise ValueError("parts: give a list of texts with a slot between each two")
    return documents


def _continue(
    model: PreTrainedModel,
    inputs: Tensor,
    mode: Mode | None,
    config: GenerationConfig | None,
    kwargs: dict[str, Any],
) -> Tensor | ModelOutput:
    """Continue each prompt."""
    if mode is None and SETTINGS.denoising:
        mode = "S2S"
    before = _get_mode(mode) if mode else []
    # With a sentinel, the continuation is the span of a slot at the end.
    has_slot = mode in ("NLU", "NLG") or (mode == "S2S" and SETTINGS.prefix_sentinel)
    opener = SETTINGS.sentinels[: int(has_slot)]
    after = [*opener, *([SETTINGS.eos] if mode and SETTINGS.eos_after_inputs else [])]
    prompts = [
        [*before, *text, *after]
        for text in _read_prompts(inputs, kwargs.pop("attention_mask", None))
    ]

    length = max(map(len, prompts))
    num_added = length - inputs.shape[1] + len(opener)
    # These count the prompt as the caller gave it.
    _raise_limits(("max_length", "min_length"), num_added, config, kwargs)
    _raise_limits(("max_new_tokens", "min_new_tokens"), len(opener), config, kwargs)
    if (streamer := kwargs.get("streamer")) is not None:
        kwargs["streamer"] = _Streamer(streamer, inputs, len(opener))
    output = _run(model, prompts, TextOnly(opener, length), (config, kwargs))

    sequences = output if isinstance(output, Tensor) else output.sequences
    # Several samples or beams of a prompt are next to each other.
    given = inputs.repeat_interleave(len(sequences) // len(inputs), dim=0)
    sequences = torch.cat([given.to(sequences.device), sequences[:, length + len(opener) :]], dim=1)
    return _replace_sequences(output, sequences)


def _read_prompts(inputs: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Return prompts without their padding."""
    if attention_mask is None:
        return [list(row) for row in inputs.tolist()]
    if (attention_mask.diff(dim=1) < 0).any():
        raise ValueError("attention_mask: prompts must be padded on the left: padding_side='left'")
    rows = zip(inputs, attention_mask.bool(), strict=True)
    prompts = [row[is_text].tolist() for row, is_text in rows]
    if not all(prompts):
        raise ValueError("a prompt has no token: give some text to continue")
    return prompts


def _raise_limits(
    names: Sequence[str], number: int, config: GenerationConfig | None, kwargs: dict[str, Any]
) -> None:
    for name in names:
        if kwargs.get(name):
            kwargs[name] += number
        elif config is not None and getattr(config, name):
            setattr(config, name, getattr(config, name) + number)


def _fill(
    model: PreTrainedModel,
    documents: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerFast,
    mode: Mode,
    options: tuple[GenerationConfig | None, dict[str, Any]],
) -> Tensor | ModelOutput:
    """Fill the slots of each text."""
    config, kwargs = options
    effective = config or model.generation_config
    if (
        kwargs.get("streamer") is not None
        or (kwargs.get("num_beams") or effective.num_beams or 1) > 1
    ):
        raise ValueError("parts: slots are filled without a streamer, and without beams")
    end = [SETTINGS.eos] if SETTINGS.eos_after_inputs else []
    opener = _get_mode(mode)
    slots = [Slots(encode_parts(parts, tokenizer)) for parts in documents]
    prompts = [[*opener, *slot.interleave(), *end] for slot in slots]

    limit = _resolve_limit(
        model, prompts, slots, kwargs.get("max_new_tokens") or effective.max_new_tokens
    )
    # Of each slot its sentinel and text, and what closes the last.
    kwargs["max_new_tokens"] = max(slot.num_slots for slot in slots) * (limit + 1) + 1
    length = max(map(len, prompts))
    criteria = [*(kwargs.pop("stopping_criteria", None) or []), SlotsFilled(slots, length)]
    kwargs["stopping_criteria"] = criteria
    output = _run(model, prompts, SlotFiller(slots, length, limit), options)

    sequences = output if isinstance(output, Tensor) else output.sequences
    copies = len(sequences) // len(slots)
    rows = enumerate(sequences[:, length:].tolist())
    fills = [slots[row // copies].read(generated) for row, generated in rows]
    texts = [slots[row // copies].join(spans) for row, spans in enumerate(fills)]
    padded = torch.full((len(texts), max(map(len, texts))), SETTINGS.eos, device=sequences.device)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    if not isinstance(output, Tensor):
        output.fills = fills
    return _replace_sequences(output, padded)


def _resolve_limit(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    slots: Sequence[Slots],
    limit: int | None,
) -> int:
    """Return the most tokens of a slot."""
    longest: int = model.config.get_text_config().max_position_embeddings
    # All slots may reach it, each with its sentinel.
    room = min(
        (longest - len(prompt)) // slot.num_slots - 1
        for prompt, slot in zip(prompts, slots, strict=True)
    )
    if room < 1:
        raise ValueError(
            f"parts: they leave no room for slots within {longest} tokens: shorten them"
        )
    if limit is None:
        return min(room, DEFAULT_SLOT_TOKENS)
    if not 1 <= limit <= room:
        raise ValueError(f"max_new_tokens={limit} of each slot is out of range: choose 1 to {room}")
    return limit


def _run(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    processor: LogitsProcessor,
    options: tuple[GenerationConfig | None, dict[str, Any]],
) -> Tensor | ModelOutput:
    """Call the class's generate() on prompts, padded on the left, under the mask that the model was trained with."""
    config, kwargs = options
    length = max(map(len, prompts))
    padded = torch.tensor([[SETTINGS.eos] * (length - len(row)) + row for row in prompts])
    num_pads = torch.tensor([length - len(row) for row in prompts])
    mask = (torch.arange(length) >= num_pads[:, None]).long()
    # First, so that others see which tokens are possible.
    processors = [processor, *(kwargs.pop("logits_processor", None) or [])]
    criteria = kwargs.pop("stopping_criteria", None) or []

    handle = None
    if SETTINGS.attention == "prefix":
        hook = PrefixMask(num_pads.to(model.device), length)
        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        # Of the class: with trust_remote_code, from_pretrained puts this module in the instance's place.
        return type(model).generate(
            model,
            padded.to(model.device),
            generation_config=config,
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(criteria),
            **kwargs,
        )
    finally:
        if handle is not None:
            handle.remove()


def _get_mode(mode: str) -> list[int]:
    if not SETTINGS.denoising:
        raise ValueError(
            "the model was trained causally, and knows neither modes nor slots: leave them out"
        )
    if mode not in SETTINGS.modes:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(SETTINGS.modes)}")
    return SETTINGS.modes[mode]


def _replace_sequences(output: Tensor | ModelOutput, sequences: Tensor) -> Tensor | ModelOutput:
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


class _Streamer(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Passes on the prompt as the caller gave it, and no sentinel."""

    def __init__(self, streamer: BaseStreamer, inputs: Tensor, num_hidden: int) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = inputs.cpu()
        self._num_hidden = num_hidden

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then each token."""
        if self._prompt is not None:
            self._streamer.put(self._prompt)
            self._prompt = None
        elif self._num_hidden:
            self._num_hidden -= 1
        else:
            self._streamer.put(value)

    def end(self) -> None:
        """End the stream."""
        self._streamer.end()
