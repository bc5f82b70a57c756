"""What memory a run will need, before any weights are loaded."""
