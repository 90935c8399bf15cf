"""The token store of a run as its inputs."""

from pathlib import Path

from ul2r.launch.run_inputs import list_run_inputs
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe


def test_both_sides_of_the_store_are_listed_with_their_sizes(tmp_path: Path) -> None:
    dataset = make_tiny_store(tmp_path / "store", num_documents=12)
    recipe = tiny_recipe(tmp_path)
    train, held_out = list_run_inputs(recipe, dataset)
    manifest = dataset.manifest
    assert (train.context, held_out.context) == ("train", "held_out")
    # MLflow keeps an input by its name and digest.
    assert train.name != held_out.name
    assert train.num_tokens == manifest.train.num_tokens
    assert held_out.num_documents == manifest.held_out.num_documents
    assert {train.fingerprint, held_out.fingerprint} == {manifest.fingerprint}
    assert train.folder == recipe.storage_paths.store
