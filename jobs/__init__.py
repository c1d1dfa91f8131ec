"""The verbs: one file each, a validated config and `run(config)`, joining the engine and the analysis."""
