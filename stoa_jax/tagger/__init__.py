"""The tagger that the package ships: its reader, trainer, lemmas and figures."""
