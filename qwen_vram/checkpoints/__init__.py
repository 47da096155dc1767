"""Everything that opens files or asks the hub: checkpoints, adapters, this machine's measured figures. No torch."""
