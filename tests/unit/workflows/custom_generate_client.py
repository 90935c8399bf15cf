"""What a user of transformers alone does with exports: run by test_custom_generate.py in a process of its own."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

Model = Any
"""A PreTrainedModel; transformers has no types."""


class Recorder(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


def run(folder: str) -> dict[str, Any]:
    """Return what each way to generate gives, as plain values."""
    request = json.loads(Path(folder, "request.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # As in the card: AutoTokenizer takes Qwen's own class, whatever tokenizer.json says.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    custom = {"custom_generate": folder, "trust_remote_code": True}
    inputs = tokenizer(request["prompts"], return_tensors="pt", padding=True)
    length = inputs["input_ids"].shape[1]
    limit = {"max_new_tokens": request["max_tokens"], "do_sample": False}

    def complete(network: Model = model, **options: object) -> list[list[int]]:
        sequences = network.generate(**inputs, **{**custom, **limit, **options})
        assert sequences[:: len(sequences) // 2, :length].equal(inputs["input_ids"])
        generated: list[list[int]] = sequences[:, length:].tolist()
        return generated

    whole = model.generate(
        **inputs, **custom, **limit, return_dict_in_generate=True, output_logits=True
    )
    filled = model.generate(
        parts=request["documents"],
        tokenizer=tokenizer,
        **custom,
        **limit,
        return_dict_in_generate=True,
    )
    result = {
        "completions": whole.sequences[:, length:].tolist(),
        "logits": torch.stack(whole.logits, dim=1).tolist(),
        "fills": filled.fills,
        "texts": tokenizer.batch_decode(filled.sequences, skip_special_tokens=True),
        "nlg": complete(mode="NLG"),
        "no cache": complete(use_cache=False),
        "static cache": complete(cache_implementation="static"),
        "max_length": complete(max_new_tokens=None, max_length=length + request["max_tokens"]),
        "prompt lookup": [
            model.generate(
                torch.tensor([tokenizer.encode(prompt)]),
                **custom,
                **limit,
                prompt_lookup_num_tokens=2,
            )[0].tolist()
            for prompt in request["prompts"]
        ],
        "causal": model.generate(**inputs, **limit)[:, length:].tolist(),
        "beams": complete(num_beams=3, num_return_sequences=2),
    }

    def sample() -> list[list[int]]:
        torch.manual_seed(3)
        return complete(do_sample=True, num_return_sequences=3, temperature=5.0, top_k=0)

    result["samples"], result["samples again"] = sample(), sample()
    recorder = Recorder()
    one = torch.tensor([tokenizer.encode(request["prompts"][0])])
    model.generate(one, **custom, **limit, mode="NLU", streamer=recorder)
    result["streamed"] = recorder.values
    result["nlu"] = model.generate(one, **custom, **limit, mode="NLU")[0].tolist()
    result["stop"] = tokenizer.decode(result["completions"][0][:2])
    stopped = model.generate(
        one, **custom, **limit, stop_strings=[result["stop"]], tokenizer=tokenizer
    )
    result["stopped"] = stopped[0, one.shape[1] :].tolist()

    eager = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True
    )
    result["eager"] = complete(eager)
    # With trust_remote_code, generate() itself is the custom one.
    again = eager.generate(**inputs, **limit)
    result["without custom_generate"] = again[:, length:].tolist()
    result["hooks"] = len(model._forward_pre_hooks)  # torch keeps them there
    result["card"] = run_code(Path(folder, "README.md").read_text(), folder)
    result["documentation"] = run_code(request["documentation"], folder)
    result["refusals"] = [
        refuse(model, inputs, **custom, past_key_values=object()),
        refuse(model, {"parts": ["a", "b"], **custom}),
        refuse(model, {"parts": ["a", "", "b"], "tokenizer": tokenizer, **custom}),
        refuse(model, {"parts": ["a"], "tokenizer": tokenizer, **custom}),
        refuse(model, {"parts": ["a", "b"], "tokenizer": tokenizer, **custom, "num_beams": 2}),
        refuse(
            model, {"parts": ["a", "b"], "tokenizer": tokenizer, **custom, "max_new_tokens": 999}
        ),
        refuse(model, inputs, **custom, mode="XXX"),
        refuse(
            model, {"input_ids": one, "attention_mask": 1 - torch.eye(1, one.shape[1]), **custom}
        ),
        refuse(model, {"input_ids": one, "attention_mask": torch.eye(1, one.shape[1]), **custom}),
    ]
    return result


def run_code(page: str, folder: str) -> str:
    """Return what the code of a page prints when it is run in an export's folder."""
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec("".join(blocks), {"MODEL": folder})  # what a reader of the page would run
    return printed.getvalue()


def refuse(model: Model, inputs: dict[str, object], **options: object) -> str:
    try:
        model.generate(**{**inputs, **options})
    except ValueError as error:
        return str(error)
    return "not refused"


def main() -> None:
    # Not importable at all: the test leaves the project's folders out of the path.
    results = {folder: run(folder) for folder in sys.argv[2:]}
    assert not any(name.partition(".")[0] == "ul2r" for name in sys.modules)
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
