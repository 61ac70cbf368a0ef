"""What a decoder layer is made of, for every supported family."""
