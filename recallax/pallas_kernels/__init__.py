"""Ops: one folder each, with validation and dispatch, a readable definition, and one file per implementation."""
