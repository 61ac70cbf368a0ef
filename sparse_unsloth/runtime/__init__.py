"""An attached model: its state, and the life of one forward."""
