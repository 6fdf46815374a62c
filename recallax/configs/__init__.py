"""Configs of runs, one file per run; its docstring has the question, the expected result, the cost and commands."""
