"""What each TorchTitan release expects, and the command that starts training."""
