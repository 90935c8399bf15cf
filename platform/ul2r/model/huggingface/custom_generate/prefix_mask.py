"""Masks under which a prompt sees itself in both directions."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


class PrefixMask:
    """Forward hook that replaces the causal mask by that of a prefix language model.

    Prompt tokens see each other, later tokens see all before them, and nothing sees padding. In layers with a sliding
    window tokens see as far ahead as back, as in training.
    """

    def __init__(self, num_pads: Tensor, length: int) -> None:
        """Take the number of padding tokens in front of each prompt, (B,), and the length of prompts with them."""
        self._num_pads = num_pads
        self._length = length
        # The hook is the model's, which other threads may use.
        self._thread = threading.get_ident()

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of a forward pass with the mask, None to leave them as they are."""
        tokens = kwargs.get("input_ids")
        # A token alone sees all before it: transformers' own mask.
        if tokens is None or tokens.shape[1] == 1 or threading.get_ident() != self._thread:
            return None
        implementation = (
            model.config._attn_implementation
        )  # as transformers' mask functions ask for it
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={implementation!r} takes no mask of a prefix: load the model with 'sdpa'"
            )

        masks = self._build_masks(model, tokens.shape, kwargs.get("past_key_values"))
        if implementation == "eager":
            # Added to the scores.
            lowest = torch.finfo(model.dtype).min
            masks = {
                kind: torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, lowest)
                for kind, mask in masks.items()
            }
        # A model whose layers are all of one kind takes its mask alone.
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return args, kwargs | {"attention_mask": mask}

    def _build_masks(
        self, model: PreTrainedModel, shape: tuple[int, int], cache: Cache | None
    ) -> dict[str, Tensor]:
        """Return the mask of each kind of layers, bool (B, 1, queries, keys)."""
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        # Without kinds, all layers have the window.
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        if window is None:
            kinds = ["full_attention"]
        return {
            kind: self._build(
                shape, cache, kinds.index(kind), window if kind == "sliding_attention" else None
            )
            for kind in dict.fromkeys(kinds)
        }

    def _build(
        self, shape: tuple[int, int], cache: Cache | None, layer: int, window: int | None
    ) -> Tensor:
        """Return the mask of layers that have a window, or none."""
        num_rows, num_queries = shape
        num_keys, first_key, first_query = num_queries, 0, 0
        if cache is not None:
            # Layers with a window keep only the last keys.
            num_keys, first_key = cache.get_mask_sizes(num_queries, layer)
            first_query = int(cache.get_seq_length(layer))
        device = self._num_pads.device
        query = (first_query + torch.arange(num_queries, device=device))[:, None]
        key = (first_key + torch.arange(num_keys, device=device))[None]

        is_seen = (key <= query) | ((query < self._length) & (key < self._length))
        if window is not None:
            is_seen &= (key - query).abs() < window
        # Beams and several samples of a prompt are rows of their own, next to each other.
        num_pads = self._num_pads.repeat_interleave(num_rows // len(self._num_pads))
        is_text = key >= num_pads[:, None, None]  # (B, 1, keys)
        # Padding sees itself: a softmax over no key is NaN.
        return ((is_seen & is_text) | (key == query))[:, None]
