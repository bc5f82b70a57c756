"""Rows of files, each value as the file has it."""
