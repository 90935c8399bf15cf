"""The course of answers as a logits processor of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from ul2r.inference.loading import load_export_tokenizer, mark_text_ids, read_eos_token_ids
from ul2r.inference.plans import make_plan
from ul2r.model.export_metadata import read_export_metadata
from ul2r_vllm.walk import AnswerWalk

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ARGUMENT = "ul2r_plan"
"""Key of `SamplingParams.extra_args` under which a request describes its plan, see `ul2r.inference.plans.Plan`."""


class _Row:
    """A request of the batch with the place in its answer."""

    def __init__(self, walk: AnswerWalk, outputs: list[int]) -> None:
        self.walk = walk
        # vLLM's own list, to which it appends.
        self._outputs = outputs
        self._num_read = 0

    def catch_up(self) -> AnswerWalk:
        """Read the tokens that were generated since the last call."""
        while self._num_read < len(self._outputs):
            token = self._outputs[self._num_read]
            assert token >= 0, "a token that is not known yet"
            if not self.walk.is_done:
                self.walk.push(token)
            self._num_read += 1
        return self.walk


class AnswerConstraint(LogitsProcessor):
    """Leaves to each answer with a plan the tokens that its plan allows; other requests are vLLM's."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        is_pin_memory: bool,  # noqa: ARG002  vLLM's
    ) -> None:
        folder = Path(vllm_config.model_config.model)
        metadata = read_export_metadata(folder)
        size = vllm_config.model_config.get_vocab_size()
        tokenizer = load_export_tokenizer(folder, metadata, size)
        is_text = mark_text_ids(
            tokenizer, metadata.vocabulary, read_eos_token_ids(folder, metadata), size
        )
        self._is_other = ~is_text.to(device)
        self._rows: dict[int, _Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a plan that is none.

        Raises:
            ValueError: If the request has one.
        """
        description = (sampling_params.extra_args or {}).get(ARGUMENT)
        if description is None:
            return
        try:
            make_plan(description)
        except TypeError as error:
            raise ValueError(f"{ARGUMENT}: {error}") from error

    def is_argmax_invariant(self) -> bool:
        """Return False: the most likely token may be forbidden."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that join, leave and move; see `LogitsProcessor`."""
        if batch_update is None:
            return
        # In this order, as vLLM asks for.
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, outputs in batch_update.added:
            self._rows.pop(index, None)
            description = (params.extra_args or {}).get(ARGUMENT)
            if description is not None:
                self._rows[index] = _Row(AnswerWalk(make_plan(description)), outputs)
        for source, target, direction in batch_update.moved:
            moved = self._rows.pop(source, None)
            replaced = self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Return logits (B, V) in which what plans do not allow is -inf, changed in place."""
        if not self._rows:
            return logits
        allowed_rows = list[int]()
        allowed_ids = list[int]()
        given_rows = list[int]()
        for index, row in self._rows.items():
            walk = row.catch_up()
            ids: tuple[int, ...] = ()
            if walk.given is not None:
                given_rows.append(index)
                ids = (walk.given,)
            elif not walk.is_done:
                ids = walk.plan.also_allowed()
            allowed_rows += [index] * len(ids)
            allowed_ids += ids

        chosen = logits[allowed_rows, allowed_ids]
        rows = list(self._rows)
        logits[rows] = logits[rows].masked_fill(self._is_other, -torch.inf)
        logits[given_rows] = -torch.inf
        logits[allowed_rows, allowed_ids] = chosen
        return logits
