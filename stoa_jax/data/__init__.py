"""Data: from files as published to batches."""
