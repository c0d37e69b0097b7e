"""What the site has beside `docs/`: README as its front page, the files that pages link to, the reference of options.

Links are written as they are in the repository, where they lead from file to file; here they follow a file to its page.
"""

from __future__ import annotations

import importlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files
from typer.testing import CliRunner

from l2d_framework.cli import COMMANDS, app
from l2d_framework.cli.help import Place, facts, places_of_run
from l2d_framework.config import json_schema
from l2d_framework.registry import INTERFACES, registry

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
"""Pages outside `docs/`."""
_SOURCE = (".py", ".toml", ".yaml")
"""Endings of files that get a page of their own."""
Where = tuple[str, ...]
"""Names of the fields and components that a field of a run file stands under."""
_LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Add what does not lie in `docs/`.

    Args:
        files: those of `docs/`.
        config: of the site.

    Returns:
        These and the others.
    """
    waiting = [ROOT / name for name in TOP] + sorted((ROOT / "docs").rglob("*.md"))
    known = set(waiting)
    for path in waiting:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in _SOURCE:
            text = f"# `{name}`\n\n```{path.suffix[1:]}\n{path.read_text(encoding='utf-8')}```\n"
            # A search for a word should find what explains it.
            text = f"---\nsearch: {{exclude: true}}\n---\n{text}"
            files.append(File.generated(config, page_of(name), content=text))
            continue
        if not name.startswith("docs/"):
            files.append(File.generated(config, page_of(name), abs_src_path=str(path)))
        if path.suffix == ".md":
            for link in _LINK.findall(path.read_text(encoding="utf-8")):
                target = ROOT / _target(name, link)
                if target.is_file() and target not in known:
                    known.add(target)
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links from file to file of the repository into links from page to page, and add what is made of docstrings.

    Args:
        markdown: of the page.
        page: the page.
        config: of the site.
        files: all of the site.

    Returns:
        The same text with other links, and with the rest of a page of the reference.
    """
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(page_of(_target(file_of(here), link[1])), posixpath.dirname(here) or ".")

    made = REFERENCE.get(here, tuple)()
    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(moved, text) for text in parts[::2]]
    return "\n".join(["".join(parts), *made])


def file_of(page: str) -> str:
    """Where a page's file lies in the repository."""
    if page == "index.md":
        return "README.md"
    return page if (ROOT / page).exists() else f"docs/{page}"


def page_of(path: str) -> str:
    """Where the site has a file of the repository."""
    page = "index.md" if path == "README.md" else path.removeprefix("docs/")
    return f"{page}.md" if page.endswith(_SOURCE) else page


def _target(file: str, link: str) -> str:
    """The file of the repository that a link in another leads to; of a folder its README."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(file), link))
    return f"{target}/README.md" if (ROOT / target).is_dir() else target


def _options() -> Iterator[str]:
    schema = json_schema()
    about: dict[tuple[str, Where], str] = {}
    sections: dict[tuple[int, ...], list[tuple[str, Where]]] = {}
    fields: dict[tuple[str, Where], list[Place]] = {}
    for run in schema["$defs"].values():
        for place in places_of_run(schema, run):
            about[place.run, ()] = run["description"]
            about[place.run, place.path] = place.schema.get("description", "")
            if "properties" not in place.schema:
                fields.setdefault((place.run, place.path[:-1]), []).append(place)
    for where, inside in fields.items():
        sections.setdefault(tuple(id(place.schema) for place in inside), []).append(where)
    for places in sections.values():
        kind, path = min(places, key=lambda where: len(where[1]))
        name, only = ".".join(path) or f"kind: {kind}", "" if kind == "diffusion" or not path else f" ({kind})"
        anchor = ".".join([kind, *path] if only else path) or kind
        yield f"## `{name}`{only} {{#{anchor}}}\n\n{about[kind, path]}\n"
        if path:
            yield f"In runs of kind {', '.join(dict.fromkeys(kind for kind, _ in places))}.\n"
        yield "| option | meaning | type | default | allowed |\n|---|---|---|---|---|"
        for field in fields[kind, path]:
            known = dict(facts(schema, field))
            default = f"`{known['default']}`" if "default" in field.schema and "default" in known else ""
            row = (f"`{field.path[-1]}`", about[kind, field.path], known["type"], default, known.get("allowed", ""))
            yield _row(*row)
        yield ""


def _commands() -> Iterator[str]:
    yield from _help()
    for name, entry in COMMANDS.items():
        yield f"## `l2d {name}`\n"
        yield from _help(name)
        group = getattr(importlib.import_module(f"l2d_framework.cli.{entry.module}"), entry.attribute)
        for inner in getattr(group, "registered_commands", ()):
            yield from _help(name, inner.name or inner.callback.__name__)


def _help(*words: str) -> Iterator[str]:
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="l2d", env={"COLUMNS": "100"})
    if result.exit_code:
        raise RuntimeError(f"l2d {' '.join(words)} --help ended with {result.exit_code}: {result.output}")
    yield f"```text\n{result.output.strip()}\n```\n"


def _components() -> Iterator[str]:
    known = registry()
    for kind in INTERFACES:
        yield f"## {kind.capitalize()}\n\n| name | what it is | needs |\n|---|---|---|"
        for name, component in known.components(kind).items():
            extra = f"`{component.extra}`" if component.extra else ""
            yield _row(f"`{name}`", (component.__doc__ or "").partition("\n\n")[0], extra)
        yield ""
    for title, named in (("Methods", known.methods()), ("Sampling presets", known.presets())):
        yield f"## {title}\n"
        for name, settings in named.items():
            yield f"### `{name}`\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"


REFERENCE = {
    "reference/options.md": _options,
    "reference/commands.md": _commands,
    "reference/components.md": _components,
}
"""What the site adds to pages."""
