"""LoRA adapters merged into their base one piece of a tensor at a time, in float32, and quantized at once."""
