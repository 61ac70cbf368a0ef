"""Evaluation suites for trained adapters (HumanEval, MT-Bench, lm-eval, GLUE, ARC-AGI), and comparing runs."""
