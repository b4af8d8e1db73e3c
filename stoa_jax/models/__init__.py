"""The network: CLIP towers, trajectories, actions, fusion."""
