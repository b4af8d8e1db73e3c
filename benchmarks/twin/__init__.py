"""STOA-VLP in PyTorch, as a reference for comparisons: the same network, losses and step.

`model` is the network, `losses` are the six losses, `weights` maps our parameters, `step` trains.
Only the preset `paper` is covered.
"""
