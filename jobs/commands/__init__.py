"""The command line's verbs: which options each takes, and how they become its config."""
