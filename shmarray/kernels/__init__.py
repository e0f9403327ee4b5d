"""What tasks run: the fused program, and the engines that run it."""
