"""README and docs say what is so: their Python runs as written, commands, settings and links are right."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel

from fedpeft_ext import cli
from fedpeft_ext.cli import app
from fedpeft_ext.config import Config
from fedpeft_ext.data import load_dataset
from fedpeft_ext.experiments.studies import study_by_name
from fedpeft_ext.nn import parse_spec

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_runs_as_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<documentation>", "exec"), {"__name__": "__main__"})


LANGUAGES = {"python", "bash", "yaml", "text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_goes_unchecked(page: Path) -> None:
    """Blocks of other languages, indented or without a language would not be found by the tests here."""
    text = page.read_text()
    languages = re.findall(r"^```(\w+)\n.*?^```$", text, re.M | re.S)
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.M)) == 2 * len(languages)
    assert set(languages) <= LANGUAGES


@pytest.mark.parametrize(
    "text",
    [text for page in PAGES for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)],
)
def test_yaml_is_settings(text: str) -> None:
    Config.from_dict(yaml.safe_load(text))


def commands_of(page: Path) -> list[str]:
    """Lines that begin with `fedpeft`, in fenced and indented blocks, and commands with options in prose."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    text = re.sub(
        r"(?:torchrun [^`\n]*|python )-m fedpeft_ext (.*?)(?: \.\.\.)?$", r"fedpeft \1", text, flags=re.M
    )
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("fedpeft ")]
    return lines + [line for line in re.findall(r"`(fedpeft [^`]+)`", text) if " -" in line]


COMMANDS = [
    pytest.param(line, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, line in enumerate(commands_of(page))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_valid(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of commands, options, settings, embeddings and studies, and types of values; nothing is run."""
    monkeypatch.chdir(ROOT)
    commands = typer.main.get_command(app).commands
    _, name, *arguments = shlex.split(line.replace("<file>", "ml-100k"), comments=True)
    if arguments == ["--help"]:
        return
    given = commands[name].make_context(name, arguments).params
    if name not in ("run", "compare", "study"):
        return
    file, names = given["config"], given.get("embeddings") or given.get("embedding") or ""
    if file is not None and file.suffix:
        file = None  # a reader's own
    named = [given[key] for key in ("dataset", "backbone", "rounds", "seed", "engine", "device", "threads")]
    cli._settings(file, cli._named(*named), given["set_"])
    for embedding in filter(None, names.split(",")):
        parse_spec(embedding)
    if name == "study":
        options = study_by_name(given["name"]).options
        assert {
            key for key in ("backbones", "embeddings", "vary", "budget", "check") if given[key]
        } <= options


SCRIPTS = sorted(
    {
        line.strip()
        for page in PAGES
        for line in re.findall(
            r"(?:python|torchrun [^`\n]*?) ((?:-m benchmarks\.|docs/|examples/)[^`#\n]*)", page.read_text()
        )
    }
)


@pytest.mark.parametrize("line", SCRIPTS)
def test_scripts_take_their_arguments(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each script is started as the page says, up to where it has read its arguments."""

    class Parsed(Exception):
        pass

    def parse_args(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    parse = argparse.ArgumentParser.parse_args
    name, *arguments = shlex.split(line.removeprefix("-m "))
    script = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    if "parse_args" not in script.read_text():
        assert not arguments
        return
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def test_extras_exist() -> None:
    extras = (ROOT / "pyproject.toml").read_text()
    for page in PAGES:
        for extra in re.findall(r"fedpeft_ext\[(\w+)\]", page.read_text()):
            assert re.search(rf"^{extra} = \[", extras, re.M), extra


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_scripts_and_targets_are_there(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for module, script in re.findall(r"\bpython (?:-m ([\w.]+)|([\w./]+\.py))", text):
        place = ROOT / (script or module.replace(".", "/"))
        assert place.is_file() or place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), (
            place
        )
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^(?:[\w-]+ )*{target}\b[^\n]*:", makefile, re.M), target


def test_central_training_example_saves_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    example = runpy.run_path(str(ROOT / "examples" / "central_training.py"))
    dataset = load_dataset("synthetic", num_users=80, num_items=400, interactions_per_user=12)
    rows = example["main"](dataset, start=1, epochs=1, lr=0.01, l2=1e-5, dim=16, seeds=1)
    assert [row["name"] for row in rows] == list(example["STRATEGIES"])
    assert rows[0]["trained"] == 400 * 16
    assert rows[1]["trained"] == 0
    assert rows[2]["trained"] == 8 * (400 + 16)
    assert all(0 <= row["hit_rate"] <= 1 for row in rows)
    assert "HR@10" in capsys.readouterr().out


def test_readme_has_an_example() -> None:
    assert "README-0" in [block.id for block in BLOCKS]


def settings(section: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Dotted path and default of every setting."""
    found: dict[str, object] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= settings(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = {} if field.default_factory is not None else field.default
    return found


def test_cli_page_lists_every_setting_with_its_default() -> None:
    documented: dict[str, str] = {}
    page = (ROOT / "docs" / "cli.md").read_text()
    table = page[page.index("## Settings") : page.index("## Exit codes")]
    for names, defaults in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", table, re.M):
        keys = re.findall(r"`([\w.]+)`", names)
        values = defaults.split(", ") if len(keys) > 1 else [defaults]
        assert len(keys) == len(values), names
        documented |= dict(zip(keys, values, strict=True))
    for key, default in settings(Config).items():
        assert key in documented, f"docs/cli.md leaves out {key}"
        text = documented[key].strip().strip("`")
        if default is None or isinstance(default, bool):
            assert text == {None: "null", True: "true", False: "false"}[default], key
        elif isinstance(default, int | float):
            assert float(text) == default, key
        elif isinstance(default, tuple):
            assert text == str(list(default)), key
        else:
            assert text == str(default), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, heading = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), target
            if heading:
                lines = linked.read_text().splitlines()
                assert heading in [
                    re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines
                ], target


def test_api_pages_have_every_public_name() -> None:
    """Functions called like their module, which a package's page leaves out, have lines of their own."""
    shown: set[str] = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        shown |= set(re.findall(r"^::: ([\w.]+)", page.read_text(), re.M))
    for name in (
        "ops",
        "nn",
        "backbones",
        "data",
        "pretrain",
        "simulation",
        "experiments",
        "experiments.studies",
    ):
        package = importlib.import_module(f"fedpeft_ext.{name}")
        own = {each.rpartition(".")[2] for each in shown if each.startswith(f"{package.__name__}.")}
        modules = {each.name for each in pkgutil.iter_modules(package.__path__)}
        hidden = modules if package.__name__ in shown else set(package.__all__)
        assert set(package.__all__) & hidden <= own, name


def test_requirements_pin_exact_versions() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins
