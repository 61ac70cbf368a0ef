"""Studies low-rank approximations of matrices (``toy``), model weights (``spectra``) and adapters (``prune``)."""
