"""The part-of-speech tagger that the package ships: training, lemmas and evaluation."""
