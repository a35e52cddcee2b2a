"""Scores of every training example for every target: one file a family of methods, listed in `catalogue.SCORERS`.

    influence    gradients in an index: influence, less, datainf, reach
    lexical      words: bm25, dsir
    embedding    the model's hidden states: rds, rds+
    density      how rare a row is in the corpus
    likelihood   the model's own probabilities: loss, loss_drop, ask_llm
    uniform      chance

Scorers do not import each other, and none of them decides what is chosen.
"""
