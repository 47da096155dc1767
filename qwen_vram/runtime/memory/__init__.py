"""Memory beside the model: workspaces, reserved segments, and memory given back."""
