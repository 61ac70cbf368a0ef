"""Autograd functions of the masked forward (design section 2), each beside its plain masked reference."""
