"""What happens around the training loop: progress, resilience, diagnostics, the summary."""
