"""Where each library (PEFT, Unsloth) is hooked, and how it loads a model."""
