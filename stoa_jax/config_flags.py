"""Read an experiment's configuration from the command line.

absl and ml_collections report a mistake in ten lines; this module reports it in one, with the
nearest existing key.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

from stoa_jax import config, migrations
from stoa_jax.errors import UserError

E = TypeVar("E", bound=BaseException)


def parse(known: flags.FlagValues, argv: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """Add --config to `known`, parse `argv`, and return the configuration and the other arguments.

    `argv` begins with the program's name. Any mistake in it raises UserError.
    """
    holder = config_flags.DEFINE_config_file(
        "config", None, "The experiment: a file of configs/, FILE.py:ARGUMENT.", flag_values=known
    )
    # ml_collections searches sys.argv for --config.KEY=VALUE, instead of the parsed arguments.
    before, sys.argv = sys.argv, list(argv)
    try:
        rest = known(list(argv))[1:]
        c = holder.value
        if c is not None:
            config.model_config(c)  # reports a file that could not be read
    except UserError:
        raise
    except Exception as error:
        # absl and ml_collections wrap the exceptions of a configuration file.
        mistake = find_cause(error, UserError)
        raise mistake or UserError(_flag_mistake(argv, error)) from None
    finally:
        sys.argv = before
    if c is None:
        raise UserError("--config is missing; for example --config=configs/pretrain.py:synthetic")
    return c, rest


def find_cause(error: BaseException | None, kind: type[E]) -> E | None:
    """Return the first error of a type in the chain of causes that led to `error`."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def known_keys() -> list[str]:
    """List every key that a configuration has, sections included."""
    from stoa_jax.workdir import flat_config

    keys = list(flat_config(config.default()))
    return keys + sorted({key.rpartition(".")[0] for key in keys} - {""})


def nearest(key: str, known: Iterable[str]) -> str:
    """Return "; the nearest is 'KEY'" for a misspelt key, or "" if none is near."""
    known = list(known)
    close = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        last = key.split(".")[-1]
        names = {name.split(".")[-1]: name for name in known}
        close = [names[n] for n in difflib.get_close_matches(last, names, 1, cutoff=0.6)]
    return f"; the nearest is {close[0]!r}" if close else ""


def _flag_mistake(argv: Sequence[str], error: Exception) -> str:
    """Put an error of absl or ml_collections into one line."""
    text = " ".join(str(error).split())
    if missing := re.search(r"No such file or directory: '([^']+)'", text):
        return f"--config={missing[1]}: no such file"
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    for arg in argv[1:]:
        if not arg.startswith("--config."):
            continue
        key = arg.removeprefix("--config.").split("=")[0]
        if key in migrations.CONFIG_KEYS:
            return _renamed(f"--config.{key}", key)
        known = known_keys()
        if key not in known:
            return f"--config.{key}: no such key{nearest(key, known)}"
    found = re.search(r"Key \"?'?(\w+)'?\"? (?:does not exist|not found)", text) or re.search(
        r"'(\w+)'", text
    )
    if isinstance(error, AttributeError | KeyError) and found:
        old = next((key for key in migrations.CONFIG_KEYS if key.endswith("." + found[1])), None)
        if old is not None:
            return _renamed(f"{path}: the configuration key {old}", old)
        names = {name for full in known_keys() for name in full.split(".")}
        return f"{path}: no configuration key {found[1]!r}{nearest(found[1], names)}"
    return f"{path + ': ' if path else ''}{text[:300]}"


def _renamed(what: str, key: str) -> str:
    new = migrations.CONFIG_KEYS[key]
    return f"{what} was renamed; write {new}" if new else f"{what} was removed; leave it out"
