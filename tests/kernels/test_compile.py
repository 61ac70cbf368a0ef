"""Every kernel compiles for a GPU with the arguments of its launcher."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_kernels_compile_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("compile_worker.py"))]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    compiled = {line.split(":")[0] for line in process.stdout.splitlines()}
    sources = "\n".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    launched = set(re.findall(r"launch\((\w+_kernel),", sources))
    assert compiled == launched
