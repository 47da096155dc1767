"""How the demo checkpoint is made: tokenizer, training, examination. Not part of the package."""
