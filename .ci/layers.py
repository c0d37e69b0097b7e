"""Draw the layers of the import contracts, with what each module says of itself, into CONTRIBUTING.md."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(?<=<!-- layers -->\n).*?(?=<!-- /layers -->)", re.DOTALL)


def said(module: str) -> str:
    """First sentence of a module's docstring, without the module's own name in front."""
    path = ROOT / "l2d_framework" / module
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    first = re.split(r"[.;](?:\s|$)", text)[0]
    return first.removeprefix(f"{module.capitalize()}: ")


def picture() -> str:
    """The layers from the top, each of which imports only what stands below it."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    contracts = tools["importlinter"]["contracts"]
    (layers,) = [found["layers"] for found in contracts if found.get("containers") == ["l2d_framework"]]
    rows = [re.split(r"\s*[|:]\s*", layer) for layer in layers]
    width = max(len(name) for row in rows for name in row)
    lines = []
    for row in rows:
        lines.append("├" + "─" * 118)
        lines += [f"│ {name:<{width}}  {said(name)}" for name in row]
    lines[0] = "┌" + lines[0][1:]
    return "```text\n" + "\n".join([*lines, "└" + "─" * 118]) + "\n```\n"


def drawn() -> str:
    """CONTRIBUTING.md as it should be."""
    return PLACE.sub(lambda _: picture(), (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    target = ROOT / "CONTRIBUTING.md"
    if "--check" in sys.argv:
        sys.exit(None if target.read_text(encoding="utf-8") == drawn() else "Run: python .ci/layers.py")
    target.write_text(drawn(), encoding="utf-8")
