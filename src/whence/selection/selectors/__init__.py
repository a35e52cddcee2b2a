"""Selection from scores: an order over rows, then filters and a budget; orders are listed in `catalogue.SELECTORS`."""
