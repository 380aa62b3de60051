"""What several sets share: norms, rounding, roots, thresholds and singular values of batches."""
