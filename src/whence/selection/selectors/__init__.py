"""Orders over rows, from scores; listed in `catalogue.SELECTORS`.

    ranked        one order for all targets: max, mean
    round_robin   targets take turns

A selector only says which row comes next: filters, limits and the budget are for `selection.choice`.
"""
