"""`python -m hf_distill`, and `accelerate launch -m hf_distill`: the command line."""

import sys

from hf_distill.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
