"""One decoder layer of the Llama kind: what it is made of, and what it computes."""
