"""Check that an experiment's data is complete, readable and comparable."""
