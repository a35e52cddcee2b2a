"""Do attribution and data selection predict what training does? Trainings grade them.

    selection   trains a model on each method's choice and grades it on held-out rows, beside chance and all rows
    joining     compares scores summed by partition with the losses of a pool without that partition

Every number stands beside chance, with an interval. Nothing here scores a row or chooses one itself: `selection` and
`ablation` do, by the same functions as their verbs.
"""
