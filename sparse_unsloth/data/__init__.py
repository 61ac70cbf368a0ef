"""What recipes train on: data sets in the form that TRL or transformers takes, with every row accounted for."""
