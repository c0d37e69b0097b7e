"""`python -m l2d_framework.cli`, for launchers such as `torchrun -m l2d_framework.cli train RUN.yaml`."""

from l2d_framework.cli import main

if __name__ == "__main__":
    main()
