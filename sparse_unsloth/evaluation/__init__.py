"""``sparse-unsloth evaluate``: what a trained adapter can do, judged by libraries that others judge theirs by."""
