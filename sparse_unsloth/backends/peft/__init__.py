"""Hooks and loading with transformers and PEFT alone."""
