"""What an H100 would do in a training step, on a machine without one."""
