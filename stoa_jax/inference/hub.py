"""The Hugging Face Hub: models by name, and uploads. huggingface_hub is optional."""

from pathlib import Path
from typing import Any

from stoa_jax.errors import UserError
from stoa_jax.inference.opened import Opened

INSTALL = 'pip install "huggingface_hub>=0.30,<2"'


def _import() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"models of the Hugging Face Hub need huggingface_hub: {INSTALL}") from None
    return huggingface_hub


def download(name: str) -> Path:
    """Return the directory of a model's snapshot: fetched, or from the cache without network."""
    try:
        hub = _import()
    except UserError as error:
        raise UserError(f"{name}: no such file or directory; {error}") from None
    try:
        return Path(hub.snapshot_download(name))
    except Exception as error:  # requests, httpx and the Hub each have their own
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")
        raise UserError(
            f"{name}: no such file or directory, and no model of this name could be had from the "
            f"Hugging Face Hub or its cache ({reason})"
        ) from None


def push(model: Opened, name: str, **options: Any) -> str:
    """Upload a saved model and its card, by `huggingface_hub.ModelHubMixin`."""
    hub = _import()

    class Upload(hub.ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            from stoa_jax.inference.saving import write_files

            write_files(model, Path(save_directory))

    return str(Upload().push_to_hub(name, **options))
