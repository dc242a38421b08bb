"""The settings of a study: defaults, checks and command-line flags."""
