"""Files of a checkpoint folder: names, JSON and safetensors headers, with clear errors."""
