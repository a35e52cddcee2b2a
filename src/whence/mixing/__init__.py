"""Which mixture of domains should a model be trained on?

A table of mixtures that were tried, each with the losses that it gave, is fitted by a law: losses as a function of the
shares. The law is graded on mixtures that it was fitted without, and minimised within the shares that the data allows.
In the order in which data flows:

    tables     files of shares and losses -> a checked `MixtureTable`
    laws       one file a law: fitted to a table, it predicts the losses of any mixture
    protocols  what every law offers
    simplex    the best mixture under a law, its caps, and the share at which forgetting begins
    pipeline   `mix_law`: fit, grade by cross-validation, optimise, and say what to doubt

Nothing here trains or loads a model, and nothing needs to know where the losses come from.
"""
