"""Commands, recipes and code of the documentation: each is tried here, or says which test runs it, or why none does.

A fence of shell commands is run by bash in a copy of the checkout in which programs only record their arguments. Each
recorded command line is then parsed to its end by the real parser, up to the point where work would begin: recipes are
loaded, `make` runs its real targets, requests are answered by a tiny model. In front of any other fence stands a
comment, which readers do not see: `<!-- not run: REASON -->` or `<!-- run by: FILE::TEST -->`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from starlette.testclient import TestClient

import ul2r.__main__
from serving.api import create_api
from serving.service import InferenceService
from ul2r.config import Comparison, Recipe, load
from ul2r.inference import LanguageModel
from ul2r.testing.families import write_random_model
from ul2r.testing.models import write_tiny_export
from ul2r.testing.tokenizers import make_llama_3
from ul2r.workflows.new import write_project

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "clusters/README.md",
    "benchmarks/device.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>not run|run by): (?P<reason>.+) -->\n)?"
    r"```(?P<language>.*)\n(?P<text>(?:.*\n)*?)```$",
    re.MULTILINE,
)
RECORDED = ("curl", "python", "ray", "torchrun", "ul2r")
DEVELOPMENT_TOOLS = ("mkdocs", "mypy", "pre-commit", "pytest", "ruff")
SYSTEM_PROGRAMS = ("awk", "bash", "echo", "make", "sh", "test")
RECORDER = "#!/bin/sh\n" + r"""printf '%s\0' "$#" "${0##*/}" "$@" >> "$RECORD" """ + "\n"


@dataclass(frozen=True)
class Fence:
    """A block of a document between two lines of backticks, with the comment in front of it."""

    place: str
    language: str
    text: str
    mark: str | None
    reason: str | None


def _find_fences(document: str) -> Iterator[Fence]:
    text = (ROOT / document).read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        place = f"{document}:{line}"
        yield Fence(place, found["language"], found["text"], found["mark"], found["reason"])


FENCES = [fence for document in DOCUMENTS for fence in _find_fences(document)]


def _select(language: str) -> pytest.MarkDecorator:
    fences = [fence for fence in FENCES if fence.language == language and fence.mark is None]
    return pytest.mark.parametrize("fence", fences, ids=lambda fence: fence.place)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_of_code_names_its_language(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(list(_find_fences(document)))
    outside = FENCE.sub("", text)
    # Options of mkdocstrings are indented below its `:::`.
    outside = re.sub(r"^:::.*\n(    .*\n)*", "", outside, flags=re.MULTILINE)
    assert re.findall(r"\n\n    .*", outside) == []
    known = {"json", "mermaid", "python", "sh", "text", "yaml"}
    assert {fence.place for fence in _find_fences(document) if fence.language not in known} == set()


def test_comments_about_running_stand_in_front_of_fences() -> None:
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    marks = [mark for text in texts for mark in re.findall(r"^<!-- *(?:not )?run.*", text, re.M)]
    assert len(marks) == sum(fence.mark is not None for fence in FENCES), marks


def test_tests_that_are_said_to_run_a_block_exist() -> None:
    for fence in FENCES:
        if fence.mark == "run by":
            file, _, name = (fence.reason or "").partition("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in functions, fence.place


def test_python_is_run_by_a_test_or_says_why_not() -> None:
    unmarked = [f.place for f in FENCES if f.language == "python" and f.mark is None]
    assert unmarked == []
    for fence in FENCES:
        if fence.language == "python":
            ast.parse(fence.text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_within_a_sentence_name_what_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in re.findall(r"`((?:make|python|ul2r) [^`]+)`", FENCE.sub("", text)):
        program, word, *_ = command.split()
        if program == "python":
            assert (ROOT / word).is_file(), command
        else:
            names = targets if program == "make" else [*ul2r.__main__.VERBS, "VERB"]
            assert word in names, command


@_select("json")
def test_json_can_be_read(fence: Fence) -> None:
    for line in fence.text.splitlines():
        json.loads(line)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkout whose programs record their arguments, with the files that the documentation takes as given."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "constraints.txt", "jobs", "pyproject.toml", "serving"):
        (folder / name).symlink_to(ROOT / name)

    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    for name in (*RECORDED, *DEVELOPMENT_TOOLS):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    for name in SYSTEM_PROGRAMS:
        path = shutil.which(name)
        assert path, f"apt install {name}"
        (programs / name).symlink_to(path)
    (programs / "activate").touch()
    (folder / ".venv/.installed").touch()

    for text in ("TEXT", "my/text", "path/to/text"):
        (folder / text).mkdir(parents=True)
        (folder / text / "a.py").write_text("def area(width, height):\n    return width\n" * 9_000)
    write_random_model("Llama 3.2", folder / "MODEL")
    make_llama_3().save(str(folder / "MODEL/tokenizer.json"))
    write_project(str(folder / "MODEL"), [str(folder / "TEXT")], folder / "mine")
    (folder / "RECIPE").write_text("extends: jobs/recipes/demo-ul2r.yaml\n")
    return folder


@pytest.fixture
def in_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Change to the checkout, and undo what command lines do to the process."""
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = write_tiny_export(tmp_path_factory.mktemp("docs") / "export")
    service = InferenceService(LanguageModel.load(folder))
    with TestClient(create_api(service)) as client:
        yield client
    service.close()


@_select("yaml")
def test_recipe_can_be_loaded(fence: Fence, in_checkout: pytest.MonkeyPatch) -> None:
    """Part of a recipe is laid over one of the demo's."""
    tree = yaml.safe_load(fence.text)
    path = Path("fence.yaml")
    if "recipes" in tree:
        path.write_text(fence.text)
        load(path, (), Comparison)
        return
    if "extends" not in tree:
        tree["extends"] = "jobs/recipes/demo-ul2r.yaml"
    path.write_text(yaml.safe_dump(tree))
    load(path, (), Recipe)


@_select("sh")
def test_commands_are_understood(
    fence: Fence, in_checkout: pytest.MonkeyPatch, client: TestClient
) -> None:
    commands = _record_commands(fence.text)
    assert commands, "no command was run"
    for program, *words in commands:
        _check_command(program, words, in_checkout, client)


def _record_commands(script: str) -> list[list[str]]:
    """Run a script with bash in the working directory, and return the command lines that its programs got."""
    record = Path("record")
    record.write_bytes(b"")
    result = subprocess.run(
        ["bash", "-euc", f"{script}\nwait"],
        env={"PATH": str(Path(".venv/bin").resolve()), "RECORD": str(record.resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr

    words = iter(record.read_text(encoding="utf-8").split("\0")[:-1])
    return [[next(words) for _ in range(int(number) + 1)] for number in words]


def _check_command(
    program: str, words: list[str], monkeypatch: pytest.MonkeyPatch, client: TestClient
) -> None:
    if program == "ul2r":
        verb, *_ = words
        if verb != "--help":
            module = importlib.import_module(f"ul2r.commands.{ul2r.__main__.VERBS[verb][0]}")
            _check_parsed(ul2r.__main__.main, words, module, monkeypatch)
    elif program == "python":
        script, *arguments = words
        _check_job(ROOT / script, arguments, monkeypatch)
    elif program == "ray":
        _check_ray(words, monkeypatch, client)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words)
        _check_job(ROOT / options.training_script, options.training_script_args, monkeypatch)
    elif program == "curl":
        _check_request(words, client)
    else:
        _check_development_tool(program, words)


def _check_parsed(
    main: Callable[[Sequence[str]], int],
    words: Sequence[str],
    module: Any,  # noqa: ANN401  a module or class
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Call `main`, whose work is `module.run`: it gets as far as that."""
    begun: list[object] = []
    with monkeypatch.context() as patch:
        for name in {"run", "print_dry_run"} & set(vars(module)):
            patch.setattr(module, name, lambda *arguments, **_: begun.append(arguments))
        assert main(words) == 0, words
    assert len(begun) == 1, words


def _check_job(path: Path, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the arguments of a script in jobs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    module = job.Demo if path.stem == "demo" else sys.modules[job.main.__module__]
    _check_parsed(job.main, words, module, monkeypatch)


def _check_ray(words: list[str], monkeypatch: pytest.MonkeyPatch, client: TestClient) -> None:
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
    context = command.make_context("ray", words)
    if "entrypoint" in context.params:
        json.loads(context.params["runtime_env_json"])
        program, *arguments = context.params["entrypoint"]
        _check_command(program, arguments, monkeypatch, client)


def _check_request(words: Sequence[str], client: TestClient) -> None:
    """Send what curl would send to a server of a tiny model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-s", action="store_true")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="data")
    options = parser.parse_args(words)
    url = re.sub(r"^(http://)?localhost:8000", "", options.url)
    headers = dict(header.split(": ", 1) for header in options.headers)
    method = "GET" if options.data is None else "POST"
    response = client.request(method, url, content=options.data, headers=headers)
    assert response.status_code == 200, response.text


def _check_development_tool(program: str, words: Sequence[str]) -> None:
    """Check that `make` installs the tool, and that files among its arguments exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert any(re.match(rf"{program}\b", package) for package in extras["dev"] + extras["docs"])
    assert [word for word in words if "/" in word and not (ROOT / word).exists()] == []
