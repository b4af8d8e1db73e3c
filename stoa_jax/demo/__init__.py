"""The demonstration on the synthetic world: the shipped model, a small training, or everything."""
