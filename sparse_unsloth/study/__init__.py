"""Studies of low rank: of matrices (``toy``), a model's weights (``spectra``), trained adapters (``prune``)."""
