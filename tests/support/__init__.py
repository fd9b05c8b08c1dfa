"""What several tests share: checkpoints, readers, damage, servers, and scripts that tests start."""
