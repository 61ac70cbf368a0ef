"""Where each training library keeps its hook points, and how it loads a model."""
