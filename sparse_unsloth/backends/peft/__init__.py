"""The hooks and the loader of the PEFT backend."""
