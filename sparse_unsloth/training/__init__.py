"""Training by a recipe: data, model, TRL trainer, run folder."""
