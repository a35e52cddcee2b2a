"""Do attribution and data selection predict what training does? Trainings grade them.

In the order in which data flows:

    bank_store                   a bank on disk: retrainings of a run without some rows, and the losses of queries
    left_out, bank_protocol      which rows each member leaves out; what a bank is of, and what may join it
    member_training              trains one member, and measures the queries on it
    bank_pipeline, bank_plan     make a bank, or let members and queries join: `whence bank`; what that would take
    bank_spread                  how much the losses of members differ
    method_scores, score_files   scores of rows for queries by any method, aligned by id, with costs; files of others
    exact_scores                 scores by unprojected gradients, as scorers
    lds                          do summed scores rank retrainings as their losses do? With intervals over both
    bank_scores                  the same of a bank and methods by name: `evaluate lds`
    removal                      trainings without a method's top rows, or on them alone: `evaluate removal`, `addition`
    planting, ranking            rows that are known to be behind an answer; measures of how they are ranked
    retrieval                    the same of methods by name: `evaluate retrieval`
    tail_patch                   what a step on the retrieved rows does to an answer: `evaluate tail-patch`
    estimates                    numbers with intervals, from resamples that all methods share
    selection, cells             trains on each method's choice and grades it on held-out rows, beside chance
    joining                      compares scores summed by partition with the losses of a pool without that partition

Every number stands beside chance, with an interval. Methods score and choose by the same functions as their verbs.
"""
