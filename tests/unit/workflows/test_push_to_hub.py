"""An export is pushed to a stand-in of the Hub's API by huggingface_hub's own client; never to the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.unit.workflows.hub_stand_in import Hub, Repository, run_hub
from ul2r.commands import export as export_command
from ul2r.config import Recipe, load
from ul2r.errors import RecipeError, ServiceError
from ul2r.testing.models import write_tiny_export
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.push_to_hub import HubTarget, find_hub_target, push_export


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with run_hub() as hub:
        # What HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_HOME set when huggingface_hub is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny_export(tmp_path / "runs/tiny/export")
    (folder / "README.md").write_text("card")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text("code")
    # Not part of an export.
    (folder / "notes.txt").write_text("private")
    (folder / "custom_generate/__pycache__").mkdir()
    (folder / "custom_generate/__pycache__/generate.pyc").write_bytes(b"")
    return folder


def recipe_for(tmp_path: Path, name: str, **export: object) -> Recipe:
    return tiny_recipe(tmp_path, export={"push_to_hub": name, **export})


def find(tmp_path: Path, name: str) -> HubTarget:
    target = find_hub_target(recipe_for(tmp_path, name))
    assert target is not None
    return target


def test_export_is_one_commit_in_a_new_private_repository(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    target = find(tmp_path, "tiny-ul2r")
    assert not hub.repositories, "nothing is created before the export is there"

    url = push_export(folder, target)

    repository = hub.repositories["me/tiny-ul2r"]
    assert url == f"{hub.url}/me/tiny-ul2r"
    assert repository.private
    assert repository.commits == ["Export of tiny"]
    local = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "notes.txt" and path.suffix != ".pyc"
    }
    assert repository.files == {".gitattributes": b"", **local}
    assert {"model.safetensors", "custom_generate/generate.py", "ul2r.json"} <= set(local)


def test_later_push_sends_what_is_new_and_removes_what_is_gone(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    target = find(tmp_path, "me/tiny")
    push_export(folder, target)
    sent = list(hub.uploaded)
    repository = hub.repositories["me/tiny"]
    repository.files["model-00002-of-00002.safetensors"] = b"of an earlier export"

    (folder / "README.md").write_text("another card")
    push_export(folder, find(tmp_path, "me/tiny"))

    assert hub.uploaded == sent, "large files were sent again"
    assert repository.files["README.md"] == b"another card"
    assert "model-00002-of-00002.safetensors" not in repository.files


def test_push_that_broke_off_is_continued_and_shows_nothing_before_its_commit(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    hub.failing_paths["/commit/"] = 500
    with pytest.raises(
        ServiceError, match="answered with HTTP status 500: run the same command again later"
    ):
        push_export(folder, find(tmp_path, "tiny"))
    assert hub.repositories["me/tiny"].files == {".gitattributes": b""}
    sent = list(hub.uploaded)
    assert len(sent) == 2

    hub.failing_paths.clear()
    push_export(folder, find(tmp_path, "tiny"))

    assert hub.uploaded == sent
    assert "model.safetensors" in hub.repositories["me/tiny"].files


def test_repository_is_public_if_asked_for(hub: Hub, folder: Path, tmp_path: Path) -> None:
    target = find_hub_target(recipe_for(tmp_path, "open", hub_private=False))
    assert target is not None
    push_export(folder, target)
    assert not hub.repositories["me/open"].private


def test_token_without_rights_is_refused_before_the_export(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal() -> str:
        with pytest.raises(ServiceError) as caught:
            find(tmp_path, "tiny")
        assert "\n" not in str(caught.value)
        assert "hf_" not in str(caught.value), "a token is shown"
        return str(caught.value)

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub does not accept the token" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert "the token of me may only read" in refusal()
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no login for the Hub: run `hf auth login`" in refusal()


def test_repository_of_something_else_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/other"] = Repository(private=False)
    assert find(tmp_path, "other").name == "me/other"  # new

    hub.repositories["me/other"].files["pytorch_model.bin"] = b""
    with pytest.raises(
        RecipeError, match=r"me/other exists on the Hub and is no export .* pytorch"
    ):
        find(tmp_path, "other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("denied/tiny", "the token may not write there"),
        ("nobody/tiny", "the Hub knows no such user"),
    ],
)
def test_place_that_is_not_ones_own_is_refused_in_one_line(
    hub: Hub, folder: Path, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(ServiceError, match=message) as caught:
        push_export(folder, find(tmp_path, name))
    assert str(caught.value).startswith(f"export.push_to_hub={name}: ")
    assert "\n" not in str(caught.value)


def test_hub_that_does_not_answer_is_refused_in_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_hub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    with pytest.raises(ServiceError, match="cannot be reached") as caught:
        find(tmp_path, "tiny")
    assert "\n" not in str(caught.value)


def test_option_sets_the_key_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Recipe] = []
    monkeypatch.setattr(export_command, "run", found.append)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: r\nstorage: {tmp_path}\ntraining: {{steps: 1, global_batch_size: 1}}\n"
        "model: {num_layers: 1, hidden_size: 8, ffn_hidden_size: 8, num_heads: 1, num_kv_heads: 1}\n"
    )
    assert load(recipe, [], Recipe).export.push_to_hub is None

    for arguments, expected in {
        ("--push-to-hub", "12"): ("12", True),
        ("--push-to-hub", "me/a-b", "--public"): ("me/a-b", False),
    }.items():
        assert export_command.main([str(recipe), *arguments]) == 0
        export = found.pop().export
        assert (export.push_to_hub, export.hub_private) == expected
    assert export_command.main([str(recipe), "--push-to-hub", "a/b/c"]) == 2


def test_endpoint_of_the_environment_is_used(hub: Hub, folder: Path) -> None:
    code = (
        "from pathlib import Path; from ul2r.workflows.push_to_hub import *;"
        f"push_export(Path({str(folder)!r}), HubTarget('me/elsewhere', private=True))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert hub.repositories["me/elsewhere"].commits == ["Export of tiny"]
