"""``sparse-unsloth bench`` as a script: times training steps, dense Unsloth and PEFT beside ours.

    python benchmarks/speed.py --model DIR --dtype 4bit --methods unsloth-dense,rows-25,rows-10,sparse-o2 --shapes all

Options: ``--help``. Rows are appended to ``benchmarks/results/speed.csv``; ``draw_speed.py`` draws them.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose kernels.py would answer to transformers' `import kernels`
    from sparse_unsloth.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
