"""Training: configuration, loop, reference log-probs, checkpoints, metrics, evaluation."""
