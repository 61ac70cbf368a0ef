"""What the channel selection did during a run."""
