"""Do attribution and data selection predict what training does? Trainings grade them.

    bank_store         a bank of real retrainings on disk: `Bank`, `open_bank`
    left_out           which rows each of its members leaves out
    bank_protocol      what a bank is of, and what may join it
    member_training    trains one member, and measures the queries on it
    bank_pipeline      `bank`: makes a bank, or lets members and queries join; bank_plan says what that takes
    bank_spread        how much the losses of members differ
    removal            trainings without a method's top rows, or on them alone, beside random rows

    selection   trains a model on each method's choice and grades it on held-out rows, beside chance and all rows
    joining     compares scores summed by partition with the losses of a pool without that partition

Every number stands beside chance, with an interval. Nothing here scores a row or chooses one itself: `selection` and
`ablation` do, by the same functions as their verbs.
"""
