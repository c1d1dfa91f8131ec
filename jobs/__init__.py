"""The verbs: one file each, a validated config and `run(config)`, joining the engine and the analysis."""

# Whose log a command shows and a run keeps: the project's own, not that of its libraries.
LOGGERS = ("engine", "analysis", "jobs", "fluoroscope")
