"""Which rows of a corpus was a model fine-tuned on? Answered from its weights and those it began with.

The weight difference theta_0 - theta_f is to first order a positive sum of the gradients of the rows trained on. Every
row gets evidence against it, and a method turns the evidence into one score a row. In the order in which data flows:

    settings            all options of a recover job
    pseudo_labels       labels rows that have none by theta_f, where it was trained to classify
    case                the two models: what differs, and a model at any point between them
    preconditioner      undoes an optimizer's scaling, and weight decay, on the weight difference
    evidence            loss, gradient norm, inner products and sketch of every row at one point
    adapters            the same for several adapters in one pass over their base
    points              the evidence at theta_0, at theta_f and between them
    membership          features of every row, and a logistic model of membership
    shadow_model        the base trained again as the model seems to have been, on rows that are known
    shadow_calibration  fits membership on a shadow
    recalibration       fits the shadow's probabilities to the corpus, since the model may have been trained otherwise
    matching_problem    a signal and the atoms to make it of, for
    pursuit             joint matching: cosine, matching pursuit, non-negative least squares, shares of sources
    scores              the methods that need no shadow
    relinearisation     trains on the chosen rows and matches what that leaves
    shares, source_models   shares of sources in what the model was trained on
    pipeline            `whence.recover`: all of it
    dry_run             `plan_recovery`: what that would take

It is never told the rows that were trained on, and never changes a model that it is given.
"""
