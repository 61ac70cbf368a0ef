"""Training data for recipes: from files and hub data sets to samples, every row accounted for."""
