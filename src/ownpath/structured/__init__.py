"""Answers that must fit a grammar: schemas and calls as grammars, their compilation, and how an answer follows one."""
