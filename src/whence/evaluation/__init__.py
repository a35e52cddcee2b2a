"""Do attribution and data selection predict what training does? Trainings grade them.

In the order in which data flows:

    bank_store         a bank of real retrainings on disk: `Bank`, `open_bank`
    left_out           which rows each of its members leaves out
    bank_protocol      what a bank is of, and what may join it
    member_training    trains one member, and measures the queries on it
    bank_pipeline      `bank`: makes a bank, or lets members and queries join; bank_plan says what that takes
    bank_spread        how much the losses of members differ

    method_scores      scores of rows for queries by any method, aligned by id, with what they cost
    exact_scores       of them, those by unprojected gradients; score_files reads those of other tools
    lds                do summed scores rank retrainings as their losses do? bank_scores: `evaluate lds`
    removal            trainings without a method's top rows, or on them alone, beside random rows
    planting           corpora with rows that are known to be behind an answer
    retrieval          are they found? `evaluate retrieval`, by the measures of `ranking`
    tail_patch         what a step on the retrieved rows does to an answer: `evaluate tail-patch`
    estimates          numbers with intervals, from resamples that all methods share

    selection          trains a model on each method's choice and grades it on held-out rows; its files are `cells`
    joining            compares scores summed by partition with the losses of a pool without that partition

Every number stands beside chance, with an interval. Methods score and choose by the same functions as their verbs.
"""
