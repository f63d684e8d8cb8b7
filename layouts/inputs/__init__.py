"""What a plan is made of: a model, a cluster, a layout, the training software, the fitted constants."""
