"""Recipes: data, model, TRL trainer, run folder."""
