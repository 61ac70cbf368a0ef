"""Makes `benchmarks` importable; the repository's root stays off the path, where `kernels` would hide a library."""

import sys
import types
from pathlib import Path

benchmarks = types.ModuleType("benchmarks")
benchmarks.__path__ = [str(Path(__file__).parents[2] / "benchmarks")]
sys.modules.setdefault("benchmarks", benchmarks)
