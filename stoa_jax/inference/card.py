"""The model card: what a model is, how it was trained, how good it is, and what limits it."""

from stoa_jax.inference.opened import Opened


def model_card(model: Opened) -> str:
    """Return a README.md for the directory or repository of a model."""
    c = model.config
    lines = [
        "---",
        "library_name: stoa_jax",
        "pipeline_tag: video-text-to-text",
        "tags: [video, stoa_jax]",
        "---",
        f"# {model.source or model.kind}",
        "",
        "```python",
        "import stoa_jax",
        "",
        'model = stoa_jax.load("PATH")',
        'vectors = model.encode_video(["clip.mp4"])',
        "```",
        "",
        f"- can: {', '.join(sorted(model.has))}",
        f"- frames: {model.frames} of {c.image_size}x{c.image_size} pixels",
        f"- fingerprint: `{model.fingerprint}`",
        "",
    ]
    return "\n".join(lines)
