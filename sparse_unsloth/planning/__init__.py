"""Predicts steps by what they compute, and plans a training by it: facts in, a plan and its table out."""
