"""Which tokens carry loss and which are context: labels to row indices, for every batch layout."""
