"""What a user asks for: sparsity of each layer, schedule, presets, files. Plain Python, no torch."""
