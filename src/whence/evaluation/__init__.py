"""Do attribution and data selection predict what training does? Trainings grade them.

In the order in which data flows:

    bank_store, bank_pipeline    retrainings of a run without some rows, kept for every method and query: `whence bank`
    method_scores, score_files   scores of rows for queries by any method, aligned by id, with costs; files of others
    exact_scores                 scores by unprojected gradients, as scorers
    lds                          do summed scores rank retrainings as their losses do? With intervals over both
    bank_scores                  the same of a bank and methods by name: `evaluate lds`
    planting, ranking            rows that are known to be behind an answer; measures of how they are ranked
    retrieval                    the same of methods by name: `evaluate retrieval`
    tail_patch                   what a step on the retrieved rows does to an answer: `evaluate tail-patch`
    estimates                    numbers with intervals, from resamples that all methods share
    selection, cells             trains on each method's choice and grades it on held-out rows, beside chance
    joining                      compares scores summed by partition with the losses of a pool without that partition

Every number stands beside chance, with an interval. Methods score and choose by the same functions as their verbs.
"""
