"""`python -m l2d_framework.evaluation.harness`: lm_eval's own command line, with the model `l2d`."""

import sys

from l2d_framework.errors import L2DError
from l2d_framework.evaluation.harness.command import run

if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except L2DError as error:
        sys.exit(f"Error: {error}")
