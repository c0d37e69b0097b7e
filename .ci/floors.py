"""Print `name==floor` for every lower bound in pyproject.toml; an argument such as torch==2.13.0 takes its place."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
groups = [project["dependencies"], *project["optional-dependencies"].values()]
bounds = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement) for group in groups for requirement in group)
floors = {bound[1]: f"{bound[1]}=={bound[2]}" for bound in bounds if bound}
print("\n".join((floors | {given.split("==")[0]: given for given in sys.argv[1:]}).values()))
