"""The demonstration on the synthetic world: the shipped model, and a training from scratch."""
