"""Calls of functions in what a model writes: their formats, found as the text comes, and the grammars that force them. Pure."""
