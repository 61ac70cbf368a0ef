"""The hooks and the loader of the Unsloth backend."""
