"""Searching for a network: what can be chosen, what it costs, in which order candidates are tried.

A candidate is a tuple of choices, one for each place of a ``SearchSpace``; the space turns it into
options of the student's config. Nothing here trains, and nothing knows how a candidate is scored.
"""
