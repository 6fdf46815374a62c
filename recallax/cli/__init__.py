"""The command line of recallax: one module per command, with the command's options and a `run` function."""
