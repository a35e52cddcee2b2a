"""Mixing laws: each predicts a model's losses from the mixture that it is trained on, after a fit to a table of both.

    exponential  L(r) = c + exp(b + t . r): few numbers, convex, good from some dozens of mixtures
    ridge        linear in the shares and their logarithms
    boosted      regression trees: no formula, best from some hundreds of mixtures

Each is one file, implements `mixing.protocols`, has one line in the catalogue and imports no other law.
"""
