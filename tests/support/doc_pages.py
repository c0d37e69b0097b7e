"""README and the pages of `docs/`: their commands, their code, and the files that they spell out."""

import re
import shlex
from dataclasses import dataclass

import shared_folders

ROOT = shared_folders.REPOSITORY
PAGES = sorted(["README.md", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))])

_PROGRAMS = "accelerate|l2d|lm_eval|make|pip|pytest|python|torchrun"
_SNIPPET = re.compile(
    r"^```(?P<language>[a-z]*)\n(?:# (?P<file>[\w.]+)\n)?(?P<code>.*?)^```$"
    rf"|^    (?P<command>(?:{_PROGRAMS}|[A-Z0-9_]+=\S+) (?:[^\n]|(?<=\\)\n)*)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """A command, a piece of Python, or a file or part of one."""

    page: str
    text: str
    language: str = ""
    """Empty for a command."""
    file: str = ""
    """Name that a comment in its first line gives it."""

    @property
    def program(self) -> str:
        """What a command runs; empty for anything else."""
        words = [] if self.language else shlex.split(self.text)
        return next((word for word in words if "=" not in word), "")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: str) -> list[Snippet]:
    """All of a page in order; commands without their comments."""
    found = []
    for match in _SNIPPET.finditer(read(page)):
        if match["command"]:
            found.append(Snippet(page, shlex.join(shlex.split(match["command"].replace("\\\n", " "), comments=True))))
        elif match["language"]:
            found.append(Snippet(page, match["code"], match["language"], match["file"] or ""))
    return found


def files(pages: list[str]) -> dict[str, str]:
    """Contents of the files that pages spell out, parts of one file joined."""
    parts: dict[str, list[str]] = {}
    for page in pages:
        for snippet in snippets(page):
            if snippet.file:
                parts.setdefault(snippet.file, []).append(snippet.text)
    return {name: "\n\n".join(texts) for name, texts in parts.items()}
