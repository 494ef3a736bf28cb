"""Data looked at before a training: faults of annotations and images, fit of a detector, label errors, contact sheets."""
