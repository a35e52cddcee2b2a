"""Which training rows should a model be trained on for a task? Any scorer with any selector, under one budget.

A baseline is a scorer, not a selector: influence, BM25, DSIR, embeddings, density, loss and chance all give scores, and
all of them are cut by the same selectors, limits and filters, so that methods differ in their scores alone. Larger
scores are more helpful, always. In the order in which data flows:

    protocols     targets, and the protocols of views, scorers and selectors
    views         what a scorer reads: an index, or a corpus that has none
    frozen_adam   the view frozen-v: Adam's features from an index of plain gradients
    scorers/      one file a family of methods: a score of every row for every target
    sampling      an order with noise: drawing without replacement as sorting
    selectors/    an order over rows, from scores
    duplicates    texts that say the same
    budget        how much may be chosen, in all and of each source
    choice        the order, cut by filters, limits and budget; a reason for every row that is left out
    settings      the settings of a choice, and the lines that tell how it was made
    pipeline      `select`: from a source and a task file to the chosen rows
    description   composition, lengths, nearness to the task, overlap with other methods

It never trains a model, and never says whether a choice was good: `evaluation.selection` does, by training on it.
"""
