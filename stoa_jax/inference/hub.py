"""The Hugging Face Hub: models by name, and uploads. huggingface_hub is optional."""

from pathlib import Path
from typing import Any

from stoa_jax.errors import UserError
from stoa_jax.inference.opened import Opened

INSTALL = "pip install 'stoa-jax[hub]'"


def _import() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"models of the Hugging Face Hub need huggingface_hub: {INSTALL}") from None
    return huggingface_hub


def download(name: str) -> Path:
    """Return the directory of a model's snapshot, downloaded or from the cache."""
    try:
        hub = _import()
    except UserError as error:
        raise UserError(f"{name}: no such file or directory; {error}") from None
    try:
        return Path(hub.snapshot_download(name))
    except Exception as error:  # requests, httpx and the Hub have different exceptions
        raise UserError(
            f"{name}: no such file or directory, and no model of this name was found on the "
            f"Hugging Face Hub or its cache ({_reason(error)}); check the name and the network, or "
            "download the model on another machine and pass its directory"
        ) from None


def push(model: Opened, name: str, **options: Any) -> str:
    """Upload a saved model and its card, by `huggingface_hub.ModelHubMixin`."""
    hub = _import()

    class Upload(hub.ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            from stoa_jax.inference.saving import write_files

            write_files(model, Path(save_directory))

    try:
        return str(Upload().push_to_hub(name, **options))
    except UserError:
        raise
    except Exception as error:  # the same libraries as in `download`
        raise UserError(
            f"push_to_hub: {name} was not uploaded ({_reason(error)}); check the network and log "
            "in with `hf auth login`"
        ) from None


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")
