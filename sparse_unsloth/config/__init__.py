"""What a user asks for: sparsity per layer, schedule, presets, files. Plain Python, no torch."""
