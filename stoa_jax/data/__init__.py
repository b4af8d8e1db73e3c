"""From published files to batches: readers, builds, checks and the input pipeline."""
