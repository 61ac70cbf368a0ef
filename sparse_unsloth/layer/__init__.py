"""One decoder layer of the Llama kind: what it is made of, what it computes, and the proof of both."""
