"""What README and `docs/` claim of themselves and of the code: lengths, links, names."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import doc_pages
import pytest
import yaml

import l2d_framework
import l2d_framework.testing

LINK = re.compile(r"\]\(([^)\s:#]+)?(?:#([^)\s]+))?\)")
CODE = re.compile(r"\[`([\w.]+)`\]\(([^)]+\.py)\)")


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", doc_pages.read(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Names that a page's headings have in links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_readme_is_one_screen_of_pitch_and_little_more():
    assert len(doc_pages.read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", [*doc_pages.PAGES, "CONTRIBUTING.md"])
def test_links_between_files_lead_to_files_and_headings_that_there_are(page):
    here = doc_pages.ROOT / page
    for path, anchor in LINK.findall(without_code(page)):
        target = (here.parent / path).resolve() if path else here
        assert target.exists(), path
        # Headings of the reference are made with the site, whose build fails for a wrong one.
        if anchor and "reference/" not in path:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_the_site_shows_every_page():
    navigation = yaml.load((doc_pages.ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["nav"]
    shown = set(re.findall(r"[\w/]+\.md", str(navigation)))
    assert {page.removeprefix("docs/") for page in doc_pages.PAGES if page != "README.md"} <= shown
    assert shown >= {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}


def test_the_reference_has_every_public_name():
    shown = set(re.findall(r"l2d_framework\.(\w+)", doc_pages.read("docs/reference/interfaces.md")))
    assert set(l2d_framework.__all__) - {"__version__"} <= shown
    (members,) = re.findall(r"members: \[(.+)\]", doc_pages.read("docs/reference/testing.md"))
    assert set(l2d_framework.testing.__all__) == set(members.split(", "))


@cache
def defined(file: Path) -> set[str]:
    """Classes, functions and methods of a file."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_equations_lead_to_classes_and_functions_that_stand_in_their_files():
    page = "docs/equations.md"
    places = CODE.findall(doc_pages.read(page))
    assert len(places) > 50
    assert [place for place in places if place[0] not in defined((doc_pages.ROOT / page).parent / place[1])] == []


def test_rows_of_data_that_the_pages_show_are_json():
    shown = [part for page in doc_pages.PAGES for part in doc_pages.snippets(page) if part.language == "json"]
    assert shown
    for part in shown:
        assert all(isinstance(json.loads(line), dict) for line in part.text.splitlines())
