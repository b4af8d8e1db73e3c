"""The network: CLIP towers, trajectory and action encoders, fusion encoder."""
