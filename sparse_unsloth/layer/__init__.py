"""One decoder layer of the Llama kind: its specification, its definition, the proof of both, and its fast form."""
