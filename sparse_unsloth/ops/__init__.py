"""The arithmetic of a decoder layer over rows of several roles: autograd Functions, each with its masked reference."""
