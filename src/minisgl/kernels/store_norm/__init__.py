"""The KV store and the next RMS norm in one launch: an experiment of the laboratory, which the engine does not run."""
