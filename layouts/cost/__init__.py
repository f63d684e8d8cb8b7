"""What one training step costs a rank: seconds and bytes, in closed form."""
