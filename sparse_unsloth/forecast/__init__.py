"""What a training will cost and gain, said before it begins: the command ``sparse-unsloth estimate``."""
