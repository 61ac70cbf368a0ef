"""Predicting step time and memory before training (`estimate`)."""
