"""Which training examples, and which of their tokens, made the model say this?

A query's gradient is compared with every example's in the index: to first order, how far a step on the example takes
the query's loss down. Larger scores are more helpful, always. Every score stands beside a null, what the same example
scores for control queries, so that chance is not read as a cause. In the order in which data flows:

    queries     prompts and completions to tokens, and to vectors in the index' space
    retrieval   vectors to ranked examples: rank, correct, re-rank by exact gradients
    nulls       control queries: z, percentile, generic examples
    levels      the level of the verdict: what meaningless completions of a query's own length reach
    matrices    the examples shown, token by token
    baselines   methods that read the corpus itself: unprojected gradients, words, embeddings, chance
    results     answers, hits and nulls as plain data
    pipeline    `trace`: checks, then all of the above

It never trains, never changes an index, and never says that an example caused an answer: only a retraining can tell.
"""
