"""The arithmetic of a decoder layer for all token roles: autograd functions, each with its masked reference."""
