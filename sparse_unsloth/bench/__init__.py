"""Measuring training steps: dense, by rows and by channels, after a check of what they compute."""
