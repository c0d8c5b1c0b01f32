"""Iterative preference training: sample, score, pair, train, and again (`fastpref rounds`)."""
