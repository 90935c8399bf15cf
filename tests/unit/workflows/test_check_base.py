"""Description of a Hugging Face model that is to be a base; what is refused is tested with the import itself."""

from __future__ import annotations

from pathlib import Path

import yaml

from ul2r.testing.families import write_random_model
from ul2r.workflows.check_base import describe_base


def test_description_ends_with_lines_for_a_recipe(tmp_path: Path) -> None:
    write_random_model("Llama 2", tmp_path)
    _, lines = describe_base(str(tmp_path)).split("\n\n")

    assert yaml.safe_load(lines) == {"base": {"hf": str(tmp_path)}}
    uncommented = lines.partition("left out:\n")[2].replace("#   ", "")
    assert yaml.safe_load(uncommented)["num_kv_heads"] == 4


def test_active_parameters_are_named_for_a_model_with_experts(tmp_path: Path) -> None:
    write_random_model("Mixtral", tmp_path)
    assert " for each token), in " in describe_base(str(tmp_path))
