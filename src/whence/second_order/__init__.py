"""The curvature of a model's loss over a corpus, layer by layer, measured once and asked often.

    fisher          passes in which the model answers itself: what the curvature is measured from
    factors         covariances of a layer's inputs and of its slopes (K-FAC)
    eigen           their eigenbases, the eigenvalues in them (EK-FAC), and products with powers of the damped curvature
    gauss_newton    exact products with the Gauss-Newton matrix, and its damped inverse by conjugate gradients
    directions      scores of rows against directions that are full matrices
    store           curvature on disk, with what it is of
    pipeline        `whence curvature`: measure the rows of an index, resumable
    dry_run         what that would take

A query's gradient is multiplied by the inverse; the rows' gradients stay as they are, so that a plain index serves
every kind of curvature. It never changes an index, and never reads a vector of one.
"""
