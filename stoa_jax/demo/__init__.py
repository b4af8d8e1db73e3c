"""The demonstration: everything once, on the synthetic world, in minutes on two CPU cores."""
