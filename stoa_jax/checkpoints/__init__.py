"""Checkpoints that ship with the package; `stoa_jax.load("synthetic")` opens the only one."""
