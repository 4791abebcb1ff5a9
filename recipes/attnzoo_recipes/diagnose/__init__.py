"""The commands that look into a trained model: `attnzoo-heads`, `attnzoo-prune`, `attnzoo-spectrum`."""
