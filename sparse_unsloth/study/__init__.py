"""Studies of low rank: of matrices (`toy`), of a model's weights (`spectra`), of trained adapters (`prune`)."""
