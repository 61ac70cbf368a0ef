"""Row sparsity: exact forward, backward through chosen rows. The default method."""
