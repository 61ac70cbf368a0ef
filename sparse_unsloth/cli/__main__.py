"""Runs the command line as ``python -m sparse_unsloth.cli``."""

import sys

from sparse_unsloth.cli.main import main

sys.exit(main())
