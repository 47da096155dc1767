"""Files of a checkpoint folder: names, JSON, safetensors headers, and the causes of what is wrong with them."""
