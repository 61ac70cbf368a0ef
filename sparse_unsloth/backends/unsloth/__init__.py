"""Hooks and loading with Unsloth's fast path."""
