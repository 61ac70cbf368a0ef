"""Front ends that load the model and build the trainer themselves: axolotl and LLaMA-Factory, a module for each."""
