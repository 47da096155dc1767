"""What is on disk or on the hub, as plain data: config.json and safetensors headers. Standard library only."""
