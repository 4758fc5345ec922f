"""What README and documentation say exists: every command line parses, every name resolves, the quick start runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from elision.cli import app
from elision.errors import InputError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}


def blocks(page: Path, kind: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == kind]


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Every line that begins with `elision`, and whether it stands alone, so that it must be whole."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("elision "):
                yield line.partition("  #")[0], True
    prose = FENCE.sub("", text)
    for line in re.findall(r"^ {4}(elision [^\n]+)", prose, re.MULTILINE):
        if "|" not in line and ":" not in line.split()[1]:
            yield line.partition("  #")[0], False
    for words in re.findall(r"`(elision[ \n][^`]+)`", prose):
        yield " ".join(words.split()), False


def check(line: str, whole: bool) -> None:
    """Walk down the tree of commands; every option must exist and every value pass its check."""
    place: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    said = "elision"
    while hasattr(place, "commands") and words and not words[0].startswith("-"):
        assert words[0] in place.commands, f"{line!r}: {said} has no command {words[0]!r}"
        said, place = f"{said} {words[0]}", place.commands[words.pop(0)]
    if whole:
        assert not hasattr(place, "commands"), f"{line!r} names no command"
        try:
            place.make_context(said, words)
        except InputError as error:  # the file of a --config, which is only spoken of
            assert "--config" in line and "is not a file" in str(error), line
        except Exception as error:
            pytest.fail(f"{line!r}: {error}")
        return
    known = {name for param in place.params for name in (*param.opts, *param.secondary_opts)} | {"--help", "--version"}
    known |= {"--install-completion", "--show-completion"}
    assert {word for word in words if word.startswith("--")} <= known, f"{line!r}: unknown option"


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str) -> None:
    for line, whole in commands(NAMES[name]):
        check(line, whole)


def test_a_wrong_command_would_be_seen() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 25
    for line, whole in (
        ("elision spd calibrat reference", False),
        ("elision eval MODEL --plam x", False),
        ("elision eval", True),
        ("elision spd calibrate reference --text a --ranks two --out b", True),
        ("elision spd", True),
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(line, whole)


def resolve(path: list[str], names: dict[str, Any]) -> Any:
    value = names[path[0]]
    for part in path[1:]:
        assert hasattr(value, part), f"{'.'.join(path)}: no {part!r}"
        value = getattr(value, part)
    return value


def dotted(node: ast.expr) -> list[str]:
    """The names of `a.b.c`; nothing where it is more than names."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return [*front, node.attr]
    return []


def check_program(source: str) -> None:
    """Imports exist, and what is called of elision has the arguments that it is given."""
    tree = ast.parse(source)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                names[alias.asname or alias.name.partition(".")[0]] = module
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = importlib.import_module(str(node.module))
                try:
                    names[alias.asname or alias.name] = getattr(module, alias.name)
                except AttributeError:
                    names[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not (path := dotted(node.func)) or path[0] not in names:
            continue
        called = resolve(path, names)
        if not getattr(called, "__module__", "").startswith("elision"):
            continue
        starred = any(isinstance(value, ast.Starred) for value in node.args) or any(
            k.arg is None for k in node.keywords
        )
        if not starred:
            inspect.signature(called).bind(*[None] * len(node.args), **{str(k.arg): None for k in node.keywords})


@pytest.mark.parametrize("name", NAMES)
def test_programs_name_what_exists(name: str) -> None:
    for block in blocks(NAMES[name], "python"):
        check_program(block)


@pytest.mark.parametrize(
    "source",
    [
        "from elision.spd import SyncPlam",
        "import elision\nelision.spd.calibrat(1)",
        "from elision import spd\nspd.calibrate(model, batches, rank=2)",
        "from elision.spd import SyncPlan\nSyncPlan(ranks=2, droped=(1,))",
        "def f(:",
    ],
)
def test_a_wrong_program_would_be_seen(source: str) -> None:
    with pytest.raises((AssertionError, ImportError, TypeError, SyntaxError)):
        check_program(source)


def test_settings_in_yaml_are_options() -> None:
    seen = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            found = re.match(r"# \S+\n", block)
            if found is None:
                continue
            seen += 1
            command: Any = typer.main.get_command(app).commands["spd"].commands["calibrate"]  # type: ignore[attr-defined]
            known = {max(param.opts, key=len).lstrip("-").replace("_", "-") for param in command.params}
            assert set(yaml.safe_load(block)) <= known, page
    assert seen


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_are_there(name: str) -> None:
    page = NAMES[name]
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        assert (page.parent / target).exists(), f"{name} points to {target}"


def test_the_site_lists_pages_that_are_there() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert len(listed) > 10 and listed <= there


def test_the_sections_of_the_maths_that_the_code_cites_are_there() -> None:
    sections = set(re.findall(r"^##+ (.+)$", (ROOT / "docs" / "maths.md").read_text(encoding="utf-8"), re.M))
    cited = {
        (path.name, name.strip())
        for folder in ("src", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for names in re.findall(r"\(maths: ([^)]+)\)", path.read_text(encoding="utf-8"))
        for name in names.split(",")
    }
    assert len(cited) > 20
    assert {each for each in cited if each[1] not in sections and each[0] != "test_docs.py"} == set()


def test_tasks_in_the_prose_exist() -> None:
    ours = {path.stem for path in (ROOT / "src/elision/tasks").glob("*.yaml")}
    for page in PAGES:
        assert set(re.findall(r"`(elision_\w+)`", page.read_text(encoding="utf-8"))) - {"elision_"} <= ours, page
    assert ours <= set(re.findall(r"`(elision_\w+)`", NAMES["docs/guides/evaluate.md"].read_text(encoding="utf-8")))


def steps(section: str) -> list[tuple[str, str]]:
    """The blocks of one section of the quick start, in its order."""
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return FENCE.findall(part)


@pytest.mark.parametrize("section", ["Fine-tune", "Serve"])
@pytest.mark.filterwarnings("ignore")  # as on a terminal, where they are no errors
def test_the_quick_start_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, body in steps(section):
        if kind == "python":
            exec(compile(body, section, "exec"), {})
        else:
            for line in body.splitlines():
                done = CliRunner().invoke(app, shlex.split(line)[1:])
                assert done.exit_code == 0, (line, done.output, done.exception)
    made = {"Fine-tune": ["adapter", "adapter-by-hand"], "Serve": ["plan.json", "report/report.html"]}
    assert all((tmp_path / name).exists() for name in made[section])


@pytest.mark.filterwarnings("ignore")
def test_the_callback_of_the_recipes_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from elision import data, reference_model
    from elision.sparselora import SparsityPlan

    monkeypatch.chdir(tmp_path)
    (program,) = [body for body in blocks(NAMES["docs/guides/recipes.md"], "python") if "class Sparse" in body]
    names: dict[str, Any] = {}
    exec(program, names)
    base, tokenizer = reference_model.load()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    SparsityPlan.uniform(model, 0.75).save("plan.json")
    rows = data.encode(tokenizer, [data.Example(f"{n} and {n} make", str(2 * n)) for n in range(6)])
    callback = names["Sparse"]()
    arguments = TrainingArguments("out", per_device_train_batch_size=2, max_steps=3, report_to=[], save_strategy="no")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=lambda chosen: data.collate(chosen, tokenizer.pad_token_id),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.handle.forwards["sparse"] == 2  # the first of three steps is dense
