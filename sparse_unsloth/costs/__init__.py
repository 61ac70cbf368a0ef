"""FLOPs and bytes of a training step, by arithmetic."""
