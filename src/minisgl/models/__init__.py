"""Models: from a name to logits.

`hub.resolve_model` finds or fetches the files and needs no torch; `registry.load_model` builds the model and loads it.
"""
